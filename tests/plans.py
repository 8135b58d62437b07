"""Training by a plan on random images, for tests that compare plans, ranks and devices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcnn import configuration
from hpcnn.arrays import Place, Shape
from hpcnn.comm import World, allreduce
from hpcnn.gpu import Copies
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.separation import SubspaceSeparation
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.parallel.whole import Whole
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.planner import Plan
from hpcnn.spec import ModelSpec
from hpcnn.train import optimizers
from hpcnn.train.update import StepUpdate


class Result(NamedTuple):
    losses: np.ndarray
    tensors: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def kinds(classes: int, shape: Shape = (9, 7, 3)) -> ModelSpec:
    """Return a small model with layers of every kind, of sizes that nothing divides."""
    graph = GraphBuilder("kinds", shape)
    graph.conv("stem", 5, 3, padding=1, activation="relu")
    graph.dropout("drop_image", 0.3)
    graph.conv("left", 7, 3, padding=1, bias=False)
    graph.batchnorm("left_norm", activation="relu")
    graph.shortcut("right", 7, source="drop_image")
    graph.add("join", "left_norm", activation="relu")
    graph.max_pool("pool", 2)
    graph.flatten("flatten")
    graph.linear("fc1", 11, activation="leaky_relu")
    graph.batchnorm("fc1_norm")
    graph.dropout("drop_features", 0.2)
    graph.linear("fc2", 11, activation="relu")
    graph.linear("fc3", classes)
    return graph.finish(classes)


def residual() -> ModelSpec:
    """Return two residual blocks with batch norm, the second with fewer rows and more channels."""
    graph = GraphBuilder("residual", (8, 8, 3))
    graph.conv("stem", 8, 3, padding=1, bias=False)
    graph.batchnorm("stem_norm", activation="relu")
    graph.conv("a", 8, 3, padding=1, bias=False)
    graph.batchnorm("a_norm", activation="relu")
    graph.add("a_sum", "stem_norm", activation="relu")
    graph.conv("b", 16, 3, stride=2, padding=1, bias=False)
    graph.batchnorm("b_norm")
    graph.shortcut("b_short", 16, stride=2, source="a_sum")
    graph.add("b_sum", "b_norm", activation="relu")
    graph.global_average_pool("pool")
    graph.linear("fc", 10)
    return graph.finish(10)


def train(
    on: World,
    spec: ModelSpec,
    plan: Plan,
    *overrides: str,
    steps: int = 3,
    dtype: type = np.float64,
    activation: object = None,
    place: Place = "cpu",
    copies: Copies | None = None,
) -> Result:
    """Return the losses of some steps on random images, and on rank 0 the global parameters and momentum."""
    config = configuration.load("lenet5", ["exchange.bucket_bytes=50000", "train.weight_decay=1e-3", *overrides])
    settings = config.exchange
    model = Model(spec, 3, dtype, plan.parts(spec, on.rank), activation=activation, place=place)
    buckets = choose_buckets(
        spec,
        settings.kind,
        bucket_bytes=settings.bucket_bytes,
        ranks=on.size,
        global_batch=plan.global_batch,
        nodes=on.engine.nodes,
        plan=plan,
        rank=on.rank,
    )
    exchange = make_exchange(settings, spec, plan, buckets, model.parameters, on)
    term = None
    if config.separation.method != "none":
        term = SubspaceSeparation(spec, config.separation, lambda sums: allreduce(on.comm, sums))
    program = Program(model, plan, on, exchange, feature_loss=term, algorithm=settings.algorithm)
    program.copies = copies
    optimizer = optimizers.build(config.train, model.parameters)
    route = program.route(plan.global_batch)
    draw = np.random.default_rng(5)
    losses = []
    for step in range(steps):
        images = draw.standard_normal((plan.global_batch, *spec.input_shape)).astype(dtype)
        labels = draw.integers(0, spec.num_classes, plan.global_batch)
        own = images[tuple(slice(*block) for block in route.images)]
        context = program.context(
            training=True, seed=1, step=step, samples=np.arange(plan.global_batch), global_batch=plan.global_batch
        )
        update = StepUpdate(
            optimizer,
            0.02,
            step,
            clip_norm=config.train.clip_norm,
            whole_tensors=exchange.owns_whole_tensors,
            sum_over_ranks=program.sum_over_ranks,
        )
        losses.append(program.train_step(own, labels[slice(*route.labels)], context, update)[0])
    exchange.settle()
    for slot in optimizer.state.values():
        exchange.collect(slot)
    whole = Whole(model, plan, on)
    tensors = {name: np.array(tensor) for name, tensor in whole.tensors(model.parameters.values).items()}
    state = {name: np.array(tensor) for name, tensor in whole.tensors(next(iter(optimizer.state.values()))).items()}
    statistics = {name: np.array(tensor) for name, tensor in whole.statistics().items()}
    return Result(np.array(on.comm.allgather(losses)).sum(axis=0), tensors, state, statistics)
