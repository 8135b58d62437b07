"""Training steps on machines that are not at hand: the program and schedules that would run there, priced.

Nothing is simulated that the planner does not price anyway: a step of P ranks is `prediction.predict` on a site of P
ranks. Speed-up is by throughput, over one core that computes alone (`machine.Described`), so that it means the same
when the batch grows with the ranks as when it does not.

Legend: P ranks, N samples of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hpcnn.config import Config
from hpcnn.errors import PlanError
from hpcnn.plan import choice, schedules
from hpcnn.plan.buckets import FLOAT_BYTES, Bucket
from hpcnn.plan.exchanges import KINDS, buckets_of
from hpcnn.plan.machine import Machine
from hpcnn.plan.planner import PRESETS, Plan, in_turns, make_plan
from hpcnn.plan.prediction import Prediction, predict
from hpcnn.plan.site import Journey, Site
from hpcnn.spec import ModelSpec

MOST_CUT = 32
"""Ranks up to which "auto" compares plans that cut layers: to place the boxes of more takes minutes."""

PLANS = ("auto", *PRESETS)
ALGORITHMS = ("auto", *dict.fromkeys(schedules.ALLREDUCE_ALGORITHMS + schedules.BLOCK_ALGORITHMS))


@dataclass(frozen=True)
class Series:
    """One curve: how the model is split, and how gradients travel.

    `plan` is a preset, or "auto" for the fastest of all (of 32 ranks and fewer; above, "data"); layer by layer no plan
    is looked for. `kind` and `algorithm` are those of `config.ExchangeConfig`.
    """

    plan: str
    kind: str
    algorithm: str

    def __post_init__(self) -> None:
        for what, value, known in (
            ("plan", self.plan, PLANS),
            ("kind", self.kind, (*KINDS, "auto")),
            ("algorithm", self.algorithm, ALGORITHMS),
        ):
            if value not in known:
                raise PlanError(f"simulate: {what} (={value!r}) is unknown; it must be one of {', '.join(known)}.")
        if self.algorithm == "pairwise" and self.kind not in ("sharded", "factors"):
            raise PlanError(
                f"simulate: algorithm 'pairwise' moves blocks, and kind (={self.kind!r}) sums whole gradients. Simulate"
                " it with kind sharded or factors."
            )

    @property
    def label(self) -> str:
        """The series, for people."""
        return f"{self.plan}, {self.kind}, {self.algorithm}"


@dataclass(frozen=True, kw_only=True)
class Travel:
    """How the gradients of one bucket travel."""

    layers: str
    kind: str
    num_bytes: int
    """Of its gradients."""
    algorithms: tuple[str, ...]
    reduce: Journey
    publish: Journey


@dataclass(frozen=True, kw_only=True)
class Point:
    """One series on one number of ranks."""

    series: Series
    ranks: int
    cores: int
    global_batch: int
    speed_up: float
    """Samples a second, by those of one core."""
    plan: Plan
    kind: str
    prediction: Prediction
    travels: tuple[Travel, ...]

    @property
    def efficiency(self) -> float:
        """Speed-up by the number of cores."""
        return self.speed_up / self.cores


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """All series, and why points are missing."""

    points: tuple[Point, ...]
    base_s: float
    """A step of `base_batch` samples on one core."""
    base_batch: int
    missing: tuple[str, ...]

    def of(self, series: Series) -> list[Point]:
        """Return the points of one series, in the order in which rank counts were asked for."""
        return [point for point in self.points if point.series == series]


def simulate(
    config: Config,
    model: ModelSpec,
    machine: Machine,
    ranks: Sequence[int],
    series: Sequence[Series],
    *,
    ranks_per_node: int = 0,
    samples_per_rank: int = 0,
) -> Simulation:
    """Return what training steps take on a machine.

    Parameters
    ----------
    config : Config
        Its batch, exchange and optimizer; `plan.preset`, `exchange.kind` and `exchange.algorithm` are the series'.
    ranks : sequence of int
        Numbers of ranks.
    ranks_per_node : int
        0: as the machine's description says, or 1.
    samples_per_rank : int
        Let the batch grow with the ranks (weak scaling); 0: it is always `train.global_batch` (strong scaling).

    Raises
    ------
    PlanError
        If nothing at all can be run so, or the machine has too few nodes.
    """
    if not ranks or min(ranks) < 1 or min(ranks_per_node, samples_per_rank) < 0:
        raise PlanError(
            f"simulate: ranks (={list(ranks)}), ranks per node (={ranks_per_node}) and samples per rank"
            f" (={samples_per_rank}) must be at least 1."
        )
    about = machine.described
    per_node = ranks_per_node or (about.ranks_per_node if about else 1)
    base_batch = samples_per_rank or config.train.global_batch
    one = _fastest(config, model, Site.of(config, machine, (0,)), Series("data", "allreduce", "auto"), base_batch)
    base_s = one.prediction.step_s * (about.cores if about else 1.0)
    points: list[Point] = []
    missing: dict[str, None] = {}
    for number in ranks:
        nodes = tuple(rank // per_node for rank in range(number))
        if machine.fabric is not None:
            machine.fabric.check_nodes(nodes[-1] + 1)
        batch = number * samples_per_rank or config.train.global_batch
        for wanted in series:
            site = replace(Site.of(config, machine, nodes), algorithm=wanted.algorithm)
            try:
                point = _fastest(config, model, site, wanted, batch)
            except PlanError as error:
                missing[f"{wanted.label} on {number} ranks: {error}"] = None
                continue
            rate = batch / point.prediction.step_s
            cores = number * (about.cores_per_rank if about else 1)
            points.append(replace(point, cores=cores, speed_up=rate * base_s / base_batch))
    if not points:
        raise PlanError(f"simulate: nothing can be run so. {next(iter(missing))}")
    return Simulation(points=tuple(points), base_s=base_s, base_batch=base_batch, missing=tuple(missing))


def _fastest(config: Config, model: ModelSpec, site: Site, series: Series, batch: int) -> Point:
    """Return the fastest plan and kind of a series; cores and speed-up are left to fill in."""
    best: Point | None = None
    plans = list(_plans(model, series, site.ranks, batch))
    for plan in (in_turns(plan, model, config.plan.turns) for plan in plans):
        for kind in (*KINDS, "auto") if series.kind == "auto" else (series.kind,):
            buckets = buckets_of(config, model, plan, site, kind=kind)
            predicted = predict(model, plan, buckets, site)
            if best is None or predicted.step_s < best.prediction.step_s:
                best = Point(
                    series=series,
                    ranks=site.ranks,
                    cores=0,
                    global_batch=batch,
                    speed_up=0.0,
                    plan=plan,
                    kind=kind,
                    prediction=predicted,
                    travels=tuple(_travel(bucket, model, site, batch) for bucket in buckets),
                )
    if best is None:
        raise PlanError(f"simulate: no preset can split '{model.name}' and {batch} samples over {site.ranks} ranks.")
    return best


def _plans(model: ModelSpec, series: Series, ranks: int, batch: int) -> Iterator[Plan]:
    if series.plan != "auto":
        yield make_plan(model, series.plan, ranks, batch)
        return
    for preset in PRESETS if ranks <= MOST_CUT else ("data",):
        try:
            yield make_plan(model, preset, ranks, batch)
        except PlanError:
            if ranks > MOST_CUT:
                raise


def _travel(bucket: Bucket, model: ModelSpec, site: Site, batch: int) -> Travel:
    reduce, publish = site.exchanged(bucket, model, batch)
    return Travel(
        layers=bucket.label,
        kind=bucket.kind,
        num_bytes=bucket.size * FLOAT_BYTES,
        algorithms=_algorithms(bucket, site),
        reduce=reduce,
        publish=publish,
    )


def _algorithms(bucket: Bucket, site: Site) -> tuple[str, ...]:
    """Return the algorithms of a bucket's collectives, those chosen where that is left to choose."""
    nodes, num_bytes, wire_bytes = site.nodes[:: bucket.cut], bucket.size * FLOAT_BYTES, site.wire_bytes
    if site.algorithm not in ("auto", "mpi") or len(nodes) == 1:
        return (site.algorithm,) if len(nodes) > 1 else ()
    if bucket.kind == "allreduce":
        return (choice.allreduce_algorithm(num_bytes, len(nodes), site.machine, nodes, wire_bytes=wire_bytes),)
    found = (
        choice.block_algorithm(num_bytes, len(nodes), site.machine, nodes, kind=kind, wire_bytes=width)
        for kind, width in (("reduce_scatter", wire_bytes), ("allgather", FLOAT_BYTES))
    )
    return tuple(dict.fromkeys(found))
