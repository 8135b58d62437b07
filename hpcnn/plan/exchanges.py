"""Which kind of exchange serves each layer, and what every kind sends.

Legend: P ranks, N samples of the global batch, n of one rank, m elements of a bucket.

===========  ============================================  =============================================
kind         a rank sends, a step (elements)               what it is
===========  ============================================  =============================================
allreduce    2 m (P-1)/P, or what the algorithm takes      every rank sums and updates everything
sharded      m (P-1)/P for gradients, the same for         a rank updates its P-th; parameters travel
             parameters
factors      n in (P-1)/P + n out (P-1), then              FC: inputs and errors travel, gradients do not
             in out (P-1)/P for parameters
===========  ============================================  =============================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from hpcnn import geometry
from hpcnn.config import Config
from hpcnn.errors import PlanError
from hpcnn.plan import choice, schedules
from hpcnn.plan.buckets import FLOAT_BYTES, SHORTEST_BUCKET_BYTES, Bucket, located, make_buckets
from hpcnn.plan.layout import Layout
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.planner import Plan
from hpcnn.plan.schedules import Schedule
from hpcnn.plan.site import Site
from hpcnn.spec import ConvSpec, LinearSpec, ModelSpec

KINDS = ("allreduce", "sharded", "factors")

MIN_BUCKETS = 8

UPDATE_BYTES = 20
"""Read and written for a parameter by SGD with momentum."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank sends for a bucket in one collective of a step."""

    item: str
    """"gradients", "parameters", "inputs" or "errors"."""
    algorithm: str
    messages: int
    num_bytes: int


def choose_buckets(
    model: ModelSpec,
    kind: str,
    *,
    bucket_bytes: int,
    ranks: int,
    global_batch: int,
    machine: Machine = DEFAULT,
    nodes: tuple[int, ...] | None = None,
    plan: Plan | None = None,
    rank: int = 0,
    wire_bytes: int = FLOAT_BYTES,
    every: Mapping[str, int] | None = None,
) -> tuple[Bucket, ...]:
    """Return the buckets of a model, each with its kind, in the order backward completes them.

    Parameters
    ----------
    kind : str
        Of layers whose plan does not name one. "allreduce" or "sharded": for all layers. "factors": for fully connected
        layers, the others being sharded.
        "auto": whatever takes the least time to travel and update, bucket by bucket.
    bucket_bytes : int
        See `make_buckets`. Small models get smaller buckets, an `MIN_BUCKETS`-th of their parameters but not below
        `SHORTEST_BUCKET_BYTES`.
    ranks, global_batch : int
        P and N.
    machine, nodes
        What links cost, and the node of every rank.
    plan, rank
        Whose parts of the layers lie in the flat vector; left out, everything does. Factors serve layers that have all
        weights on every rank and a block of the batch.
    wire_bytes : int
        Of an element of a gradient in messages.
    every : mapping of str to int
        Layers whose gradients travel once in so many steps (see `lazy_rounds`).

    Raises
    ------
    PlanError
        If the plan wants an exchange that does not exist, or that cannot serve the layer.
    """
    if plan is not None:
        cuts = plan.cut
        layers = tuple(part.spec for part in plan.parts(model, 0))  # the largest, for all ranks must close alike
        own = tuple(part.spec for part in plan.parts(model, rank))
        by_samples = {name for name, layout in plan.layouts if layout == Layout(sample=ranks)}
    else:
        cuts, own = {}, model.layers
        layers, by_samples = model.layers, {layer.name for layer in model.layers}
    small = max(SHORTEST_BUCKET_BYTES, model.num_parameters * FLOAT_BYTES // MIN_BUCKETS)
    bucket_bytes = min(bucket_bytes, small)
    linear = [layer for layer in layers if isinstance(layer, LinearSpec) and layer.name in by_samples]
    if plan is not None and plan.exchange:
        asked = dict(plan.exchange)
        _check_asked(asked, {layer.name for layer in linear})
        rest = "sharded" if kind in ("factors", "auto") else kind
        kinds = {layer.name: asked.get(layer.name, rest) for layer in layers}
        return located(make_buckets(layers, bucket_bytes, kinds, cuts, every), own)
    if kind == "factors":
        kinds = {layer.name: "sharded" for layer in layers} | {layer.name: "factors" for layer in linear}
        return located(make_buckets(layers, bucket_bytes, kinds, cuts, every), own)
    if kind != "auto":
        return located(make_buckets(layers, bucket_bytes, {layer.name: kind for layer in layers}, cuts, every), own)

    link = machine.link(same_node=nodes is not None and len(set(nodes)) == 1)

    def seconds(bucket: Bucket) -> float:
        loads = bucket_loads(bucket, model, "auto", 0, ranks, global_batch, machine, nodes, wire_bytes)
        travel_s = sum(load.messages * link.alpha_s + load.num_bytes * link.beta_s_per_byte for load in loads)
        updated = bucket.size / (1 if bucket.kind == "allreduce" else ranks)
        return travel_s + updated * UPDATE_BYTES / machine.rates.update_bytes_per_s

    def best(bucket: Bucket, kinds: Iterable[str]) -> Bucket:
        return min((replace(bucket, kind=other) for other in kinds), key=seconds)

    if ranks == 1:
        return make_buckets(layers, bucket_bytes, every=every)
    alone = {name: b for b in make_buckets(layers, 1) for name in b.layers}
    by_factors = {layer.name: "factors" for layer in linear if best(alone[layer.name], KINDS).kind == "factors"}
    buckets = make_buckets(layers, bucket_bytes, by_factors, cuts, every)
    return located([b if b.kind == "factors" else best(b, ("allreduce", "sharded")) for b in buckets], own)


def buckets_of(
    config: Config, model: ModelSpec, plan: Plan, site: Site, *, kind: str = "", rank: int = 0
) -> tuple[Bucket, ...]:
    """Return the buckets that a configuration asks for under a plan, at `site`.

    Parameters
    ----------
    kind : str
        Instead of the configuration's `exchange.kind`.
    rank : int
        Whose flat vector they lie in.

    Raises
    ------
    PlanError
        See `choose_buckets` and `lazy_rounds`.
    """
    exchange = config.exchange
    return choose_buckets(
        model,
        kind or exchange.kind,
        bucket_bytes=exchange.bucket_bytes,
        ranks=plan.ranks,
        global_batch=plan.global_batch,
        machine=site.machine,
        nodes=site.nodes,
        plan=plan,
        rank=rank,
        wire_bytes=site.wire_bytes,
        every=lazy_rounds(model, exchange.lazy_layers, exchange.lazy_steps),
    )


def lazy_rounds(model: ModelSpec, convolutions: int, steps: int) -> dict[str, int]:
    """Return the layers that are updated once in so many `steps`: all up to the given number of convolutions.

    Lee et al., "Improving scalability of parallel CNN training by adaptively adjusting parameter update frequency",
    JPDC 159, 2022: the lowest convolutions have few parameters and much to wait for, as the next forward begins there.

    Raises
    ------
    PlanError
        If the model has fewer convolutions.
    """
    found: dict[str, int] = {}
    left = convolutions
    for layer in model.layers:
        if left == 0 and (isinstance(layer, ConvSpec | LinearSpec) or not convolutions):
            return found
        left -= isinstance(layer, ConvSpec)
        if layer.parameters:
            found[layer.name] = steps
    if left > 0:
        raise PlanError(
            f"plan: exchange.lazy_layers is {convolutions} and {model.name} has {convolutions - left} convolutions."
        )
    return found


def _check_asked(asked: Mapping[str, str], linear: Collection[str]) -> None:
    for name, kind in asked.items():
        if kind not in KINDS:
            raise PlanError(f"plan: layer '{name}' has exchange (={kind!r}); it must be one of {', '.join(KINDS)}.")
        if kind == "factors" and name not in linear:
            raise PlanError(
                f"plan: layer '{name}' cannot exchange factors, which serve fully connected layers that have all their"
                ' weights on every rank. Set exchange = "sharded" for it.'
            )


def bucket_loads(
    bucket: Bucket,
    model: ModelSpec,
    algorithm: str,
    rank: int,
    ranks: int,
    global_batch: int,
    machine: Machine = DEFAULT,
    nodes: tuple[int, ...] | None = None,
    wire_bytes: int = FLOAT_BYTES,
) -> tuple[Load, ...]:
    """Return what `rank` sends for a bucket in one step, by one of hpcnn's algorithms or "auto".

    Gradients, inputs and errors travel in `wire_bytes` an element, parameters whole.
    """
    if bucket.cut > 1:
        nodes = None if nodes is None else nodes[rank % bucket.cut :: bucket.cut]
        rank, ranks = rank // bucket.cut, ranks // bucket.cut
    if ranks == 1:
        return ()

    def chosen(kind: str, count: int, wire_bytes: int = wire_bytes) -> str:
        if algorithm != "auto":
            return "butterfly" if algorithm == "halving-doubling" and kind != "allreduce" else algorithm
        if kind == "allreduce":
            return choice.allreduce_algorithm(count * FLOAT_BYTES, ranks, machine, nodes, wire_bytes=wire_bytes)
        return choice.block_algorithm(count * FLOAT_BYTES, ranks, machine, nodes, kind=kind, wire_bytes=wire_bytes)

    def gather(item: str, sizes: list[int], wire_bytes: int = FLOAT_BYTES) -> Load:
        bounds = _bounds(sizes)
        name = chosen("allgather", bounds[-1], wire_bytes)
        return _load(item, name, schedules.allgather(name, rank, ranks, bounds[-1], bounds, nodes=nodes), wire_bytes)

    if bucket.kind == "allreduce":
        name = chosen("allreduce", bucket.size)
        return (_load("gradients", name, schedules.allreduce(name, rank, ranks, bucket.size, nodes=nodes), wire_bytes),)
    if bucket.kind == "sharded":
        slices = [block.size for block in geometry.blocks(bucket.size, ranks)]
        name = chosen("reduce_scatter", bucket.size)
        scatter = schedules.reduce_scatter(name, rank, ranks, bucket.size, _bounds(slices), nodes=nodes)
        return _load("gradients", name, scatter, wire_bytes), gather("parameters", slices)
    layer = next(layer for layer in model.layers if layer.name == bucket.layers[0])
    num_out, num_in = layer.parameters["weight"]
    samples = [block.size for block in geometry.blocks(global_batch, ranks)]
    features = [block.size for block in geometry.blocks(num_in, ranks)]
    away = [samples[rank] * width for peer, width in enumerate(features) if peer != rank]  # to each, as `alltoall` does
    messages = sum(count > 0 for count in away)
    return (
        Load(item="inputs", algorithm="pairwise", messages=messages, num_bytes=sum(away) * wire_bytes),
        gather("errors", [n * num_out for n in samples], wire_bytes),
        gather("parameters", [width * num_out for width in features]),
    )


def _load(item: str, algorithm: str, schedule: Schedule, wire_bytes: int) -> Load:
    num_bytes = schedule.num_elements_sent * wire_bytes
    return Load(item=item, algorithm=algorithm, messages=schedule.num_messages, num_bytes=num_bytes)


def _bounds(sizes: list[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))
