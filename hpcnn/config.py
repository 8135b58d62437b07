"""All settings, as frozen dataclasses with their ranges and defaults. `configuration.py` reads them from TOML."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Extent = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Many = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]
AboveZero = Annotated[float, msgspec.Meta(gt=0.0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "lenet5"
    """A model of hpcnn.nn.models: lenet5 alexnet vgg11 vgg16 vgg11-32 vgg16-32 resnet20 resnet50 yolo16."""
    dropout: Fraction | None = None
    """Rate of the model's dropout layers; left out: the published one."""
    batchnorm: bool = True
    """False: without batch norm, its convolutions with bias instead. Only yolo16 can be built so."""
    sync_batchnorm: bool = True
    """Batch-norm statistics over the whole global batch (True) or over each rank's samples (False)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and what is done to them on the way in."""

    source: str = "builtin"
    """"builtin", "synthetic", an HDF5 file, or a folder with train.h5 and test.h5."""
    test: str = ""
    """HDF5 file of the test images where `source` is a file; empty: no test set."""
    image_shape: tuple[Extent, Extent, Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]] = (32, 32, 3)
    """Rows, columns and channels of synthetic images."""
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 10
    """Classes of the synthetic images."""
    num_samples: Many = 1024
    """Synthetic images in an epoch."""
    crop_padding: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 0
    """Augmentation: pad each side by so many pixels and crop back at a random place; 0: off."""
    flip: bool = False
    """Augmentation: mirror every second image, at random."""
    shuffle_block: Positive = 256
    """Consecutive rows of the file that stay together when blocks are shuffled on disk."""
    prefetch: Count = 2
    """Batches that the loader thread prepares ahead; 0: load inside the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe."""

    steps: Count = 0
    """Updates to make; 0: as many as `epochs` gives."""
    epochs: Positive = 1
    """Passes over the training images, when `steps` is 0."""
    global_batch: Many = 128
    """Samples of one update, over all ranks."""
    seed: Count = 1
    """Key of every random draw: initial weights, order, augmentation, dropout."""
    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    """Update rule."""
    lr: NonNegative = 0.1
    """Peak learning rate, for a batch of `base_batch`."""
    base_batch: Count = 0
    """Linear scaling: the rate is multiplied by global_batch / base_batch; 0: not scaled."""
    schedule: Literal["constant", "step", "cosine", "polynomial"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_epochs: NonNegative = 0.0
    """Epochs in which the rate climbs linearly from zero to its peak."""
    milestones: tuple[NonNegative, ...] = ()
    """Schedule "step": epochs after which the rate is multiplied by `gamma`."""
    gamma: NonNegative = 0.1
    """Schedule "step": the factor."""
    power: NonNegative = 2.0
    """Schedule "polynomial": the exponent."""
    momentum: Fraction = 0.9
    """SGD and LARS."""
    nesterov: bool = False
    """SGD: look ahead."""
    weight_decay: NonNegative = 0.0
    """Pull of the weights towards zero; biases and norm parameters are exempt."""
    beta1: Fraction = 0.9
    """Adam and AdamW: decay of the first moment."""
    beta2: Fraction = 0.999
    """Adam and AdamW: decay of the second moment."""
    epsilon: NonNegative = 1e-8
    """Adam, AdamW and LARS: keeps a quotient finite."""
    trust_coefficient: NonNegative = 0.001
    """LARS: ratio of weight norm to update norm."""
    clip_norm: NonNegative = 0.0
    """Largest global gradient norm; longer gradients are scaled down. 0: off."""
    label_smoothing: Fraction = 0.0
    """Share of the target probability spread evenly over all classes."""
    reproducible: bool = False
    """Same bits on any number of ranks: the batch is computed in virtual shards, and every sum over samples is a tree
    over them. On CPUs of one type, with plan.preset "data" and one number of threads; slower."""
    virtual_shards: Positive = 16
    """Virtual shards of a reproducible run, at most as many ranks. Other numbers give other bits."""
    compute: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    """Number format of the arithmetic; parameters, sums and updates are float32 in all but fp64. bf16 keeps activations
    and their gradients in 16 bits, tf32, on GPUs only, rounds the factors of matrix products. fp64 runs on plain NumPy,
    to tell rounding from mistakes."""
    max_loss: NonNegative = 0.0
    """A loss above it counts as one that is no number. 0: no limit."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """A loss or gradient that is no finite number: end the run, or go back to the newest checkpoint and on from there
    with a lower learning rate."""
    rollback_lr: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.5
    """What each such rollback multiplies the learning rate by."""
    max_rollbacks: Positive = 3
    """After so many rollbacks the next fault ends the run."""
    check_every_steps: Count = 1000
    """Compare checksums of the ranks' copies of the parameters after so many steps, and before each checkpoint, to find
    faults that nothing else shows. Not with `exchange.algorithm` "mpi", whose sums may differ in the last bits. 0: off.
    """
    on_divergence: Literal["stop", "rollback"] = "stop"
    """Copies that differ: end the run, naming the ranks, or go back to the newest checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How the layers are split over the ranks."""

    preset: Literal["data", "hybrid", "hybrid-rows", "model", "spatial", "tiled-groups", "auto"] = "data"
    """data: every rank has all weights and its share of the batch. hybrid: so do convolutions, and fully connected
    layers are cut by output features. hybrid-rows: of these the first is, the next ones by input features. model:
    filters too are cut. spatial: images are cut into tiles. tiled-groups: so are they, and ranks compute the borders of
    their tiles themselves from one pooling layer to the next. auto: the fastest, layer by layer, by what layers and
    messages cost on `exchange.machine`."""
    memory_bytes: Count = 0
    """What a rank may use for images, outputs, parameters and their gradients; plans that are predicted to need more
    are refused, and auto looks for one that fits. 0: no limit."""
    turns: tuple[Positive, Positive] = (1, 1)
    """Rows and columns of tiles that each rank computes one after the other, to hold the feature maps of one of them;
    for convolutions, poolings and activations that follow the images, from one pooling to the next. [1, 1]: off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How gradients travel."""

    kind: Literal["allreduce", "sharded", "factors", "auto"] = "allreduce"
    """allreduce: sum the gradients of all ranks. sharded: each rank sums and updates a slice, parameters travel.
    factors: the same, but fully connected layers exchange inputs and errors. auto: per bucket, by time."""
    algorithm: Literal["auto", "butterfly", "halving-doubling", "ring", "pairwise", "hierarchical", "mpi", "nccl"] = (
        "auto"
    )
    """How: hpcnn's schedules, the MPI library's own, NVIDIA's (for gradients, one rank a GPU), or the cheapest by size
    on `machine`."""
    bucket_bytes: Positive = 4_000_000
    """Gradients of consecutive layers travel together until so many bytes, or an eighth of all, are reached."""
    overlap: bool = True
    """Carry messages on in the background while the rank computes."""
    wait: Literal["layer", "step"] = "layer"
    """layer: each layer waits for its parameters when the next forward comes to it. step: all at the step's end."""
    wire: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of gradients in messages; sums are made in fp32, and parameters travel as they are."""
    lazy_layers: Count = 0
    """Lazy update: so many of the lowest convolutions, and what lies between them, add their gradients up on each rank
    and are updated by the sum once in `lazy_steps` steps. A round ends early at the end of an epoch and before a
    checkpoint. 0: none."""
    lazy_steps: Positive = 2
    """Steps of a round."""
    lazy_adaptive: bool = False
    """Let rounds grow and shrink: begin with `lazy_steps`, and compare the sum with the round's last gradient."""
    machine: str = ""
    """File that `hpcnn profile` wrote, for what is chosen by time; "": an ordinary cluster is assumed."""
    timeout_seconds: NonNegative = 600.0
    """A collective that some rank has not joined for so long ends the job, naming it. 0: wait for ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Groups of ranks that train a replica of the network each, and how these are averaged."""

    rule: Literal["none", "equal", "size", "accuracy", "inverse-loss", "softmax", "best", "mixing"] = "none"
    """none: all ranks train one network. mixing: after every step the replicas of two groups are averaged, in turn
    those that a butterfly pairs. The others average all replicas once in a round, with weights: equal; by the images of
    a group's shard (size); or by what a replica scores on held-out images (`validation_samples`): its accuracy, the
    inverse of its loss, exp(-loss / temperature) (softmax), or all to the lowest loss (best)."""
    groups: Count = 0
    """Of equally many ranks, next to each other; 0: every rank is one. `train.global_batch` is divided among them, and
    each makes its own updates, by the gradients of its part."""
    every_steps: Count = 0
    """Steps of a round; 0: see `every_epochs`."""
    every_epochs: Positive = 1
    """Epochs of a round, where `every_steps` is 0."""
    temperature: AboveZero = 0.25
    """Of softmax: the higher, the closer to equal."""
    floor: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.1
    """The least weight of a group, as a part of the equal weight."""
    smoothing: Fraction = 0.0
    """Part of the last round's weights in those of the next."""
    reparameterised: bool = False
    """Average each filter's (neuron's) direction and length apart, so that filters that disagree get no shorter."""
    momentum: Literal["average", "reset"] = "average"
    """What a round does to the state of the optimizer: the same average, or zeros."""
    validation_samples: Count = 0
    """Training images, the same on all ranks, that are held out to score replicas, whatever the rule."""
    shards: tuple[AboveZero, ...] = ()
    """Fractions of the training images, one a group, which then sees no others; left out: any group may get any image,
    each in an epoch once. All groups make equally many steps, so small shards are gone through more often."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparationConfig:
    """How far apart the features of classes shall lie."""

    method: Literal["none", "geodesic", "chordal", "rejection"] = "none"
    """none: cross entropy only. geodesic, chordal: and a distance of each class's subspace from the sum of the others.
    rejection: a network for each class, whose subspace shall reject all other classes."""
    weight: NonNegative = 1.0
    """Of the term that is added to the cross entropy; 0 leaves it out and still follows the subspaces."""
    layer: str = ""
    """Whose outputs are the features; "": what the last layer reads."""
    dimension: Positive = 4
    """Most dimensions of a class's subspace."""
    energy: Fraction = 0.0
    """Fewest dimensions that hold this share of a class's second moments are taken; 0: always `dimension`."""
    eta: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.1
    """Share of a batch in the running second moments."""
    refresh: Positive = 1
    """Steps from one eigen-decomposition to the next. geodesic, chordal: the term is added in these steps only;
    rejection: the projections stay as they are in between."""
    margin: Fraction = 0.9
    """rejection: what other classes' samples shall be rejected by at least, of at most 1."""
    held_out: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.1
    """rejection: share of the training images, of each class, that thresholds are found by."""
    groups: Count = 0
    """rejection: groups of ranks that train a network each at a time; 0: as many as there are ranks or classes."""
    unknown: bool = False
    """rejection: a test image that no class takes counts as unknown, not as the nearest one's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_epochs: Count = 1
    """Write a checkpoint after so many epochs; 0: never."""
    every_steps: Count = 0
    """Write a checkpoint after so many steps as well; 0: never."""
    keep: Positive = 2
    """Newest checkpoints that stay; the best by test accuracy and the final one stay besides."""
    final: bool = True
    """Evaluate the network after the last step, and write it to final.h5; False: for measurements of speed, whose
    networks nobody wants."""
    background: bool = True
    """Write beside the training, from a copy of parameters and optimizer state on rank 0; False: between two steps,
    without that memory."""
    on_error: Literal["stop", "continue"] = "stop"
    """A checkpoint or record that cannot be written, as on a full disk: end the run, or say so once and go on. Without
    its last checkpoint a run ends with an error in any case."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What happens when a rank dies."""

    on_rank_failure: Literal["stop", "continue"] = "stop"
    """stop: the run ends; go on with --resume. continue: the other ranks go on without it, from the last copy in
    memory; needs Open MPI 5 and `mpirun --with-ft ulfm`. A rank that hangs for `exchange.timeout_seconds` is killed
    then, if another rank runs on its node."""
    keep_every_steps: Positive = 10
    """With "continue": copy the state in memory after so many steps; these are repeated at most."""
    spare_ranks: Count = 0
    """With "continue": the last so many ranks of the job stand by and take the places of ranks that die, so that the
    plan stays what it is; best on a node of their own. Start so many more ranks than are to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is said while it runs."""

    every_seconds: NonNegative = 10.0
    """Batch log: one plain line at most so often. A terminal has a progress bar instead."""
    evaluate_every_epochs: Count = 1
    """Measure test accuracy after so many epochs; 0: only at the end (`checkpoint.final`)."""
    trace_steps: Count = 0
    """Write a timeline of so many steps, of all ranks, to trace.json in the run folder; 0: none."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs hpcnn[tensorboard])."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """The information plane: what layers share with images and labels, measured while a network trains."""

    information_plane_every_steps: Count = 0
    """Measure before the first step and after so many; 0: never."""
    samples: Annotated[int, msgspec.Meta(ge=2)] = 256
    """Images to measure on, spread evenly over their set, always the same; not cropped, not mirrored. What the layers
    make of them is in memory at once, shared out over the ranks."""
    images: Literal["test", "train"] = "test"
    """The set that they are from."""
    layers: tuple[str, ...] = ()
    """Names of layers; empty: convolutions, sums and fully connected layers that all information passes through."""
    errors: bool = False
    """Also measure what the layers' errors share with the last one's: takes a backward pass, and twice the time."""
    alpha: Annotated[float, msgspec.Meta(gt=0.0)] = 2.0
    """Order of the entropies. 2 needs no eigenvalues, which all others do; 1: von Neumann's; publications have 1.01."""
    kernel: Literal["maps", "tensor"] = "maps"
    """maps: a feature map is a variable, a layer all of them jointly. tensor: a layer is one variable."""
    width: Literal["silverman", "quantile", "alignment", "fixed"] = "silverman"
    """Rule for sigma in exp(-d^2 / (2 sigma^2)): see `hpcnn/analysis/widths.py`."""
    width_scale: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    """Factor on the rule's sigma; for "fixed", sigma itself."""
    width_quantile: Fraction = 0.05
    """Of the distances between samples, for "quantile"."""
    widen_joint: bool = True
    """Widen the kernels of a layer's maps by the square root of their number, lest many saturate at log2 samples."""
    maps_every: Count = 0
    """At every so many measurements, measure single maps, pairs of them and growing groups too; 0: never."""
    maps: Annotated[int, msgspec.Meta(ge=2)] = 16
    """Feature maps of a layer to take for that."""
    pairs: Positive = 8
    """Pairs of them, drawn once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the arithmetic runs. cuda: every rank takes a GPU of its node by its number there; several may share one,
    and it needs hpcnn[cuda13] or hpcnn[cuda12]."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    average: AverageConfig = AverageConfig()
    separation: SeparationConfig = SeparationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault: FaultConfig = FaultConfig()
    log: LogConfig = LogConfig()
    analysis: AnalysisConfig = AnalysisConfig()
