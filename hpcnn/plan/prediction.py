"""What a training step of a plan will take: the program's events, played through with a clock and a wire.

All ranks are taken to be in step: an operation lasts as long as on the rank where it is longest. There is one wire, on
which the most urgent of what is under way travels; what a step waits for adds to it, what travels meanwhile lengthens
the computation a little (`Rates.beside_s_per_byte`, `beside_share`) and is slower than it could be
(`Rates.pace_beside`). Three steps are played, as parameters of one may still travel in the next; the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hpcnn.plan.buckets import FLOAT_BYTES, Bucket
from hpcnn.plan.exchanges import UPDATE_BYTES
from hpcnn.plan.layer_work import LayerWork, memory_bytes, works
from hpcnn.plan.layout import volume
from hpcnn.plan.machine import Rates
from hpcnn.plan.movement import Movement
from hpcnn.plan.planner import Plan
from hpcnn.plan.site import NOWHERE, Journey, Site
from hpcnn.plan.work import Passes
from hpcnn.spec import BatchNormSpec, LayerSpec, ModelSpec

URGENT = -1
STEPS = 3

SEGMENTS = 2
"""Pieces of a collective that are on their way to a rank at once (`comm.collective`)."""

IMAGE_PASSES = 3
"""How often the loader and the program touch a rank's images, beside the step: normalise, convert, read."""


@dataclass(kw_only=True)
class LayerTime:
    """One layer's share of a predicted step."""

    name: str
    compute_s: float = 0.0
    exposed_s: float = 0.0
    """Waiting for what it fetches, and for its parameters."""
    num_bytes: int = 0
    """Sent by the busiest rank, gradients included."""
    num_messages: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step in the steady state."""

    step_s: float
    compute_s: float
    memory_bytes: int
    """Of arrays, on the rank with most, at the end of forward."""
    layers: tuple[LayerTime, ...]

    @property
    def exposed_s(self) -> float:
        """Seconds in which the ranks do nothing but wait for messages."""
        return self.step_s - self.compute_s


def predict(model: ModelSpec, plan: Plan, buckets: Sequence[Bucket], site: Site) -> Prediction:
    """Return what a step of a plan takes.

    Parameters
    ----------
    buckets : sequence of Bucket
        How gradients travel, in the order in which backward completes them (`exchanges.choose_buckets`).
    site : Site
        Where, and by which settings.
    """
    placement = plan.place(model, plan.global_batch)
    every = works(model, plan, placement, site)
    ways = [_mean(site.exchanged(bucket, model, plan.global_batch), bucket.every) for bucket in buckets]
    loss = (NOWHERE, NOWHERE)
    if placement.loss_moved:
        loss = site.moved(Movement(placement.layers[model.layers[-1].name].owned, placement.loss))
    player = _Player(model, every, buckets, ways, loss, site)
    images = max(volume(box) for box in placement.images) * FLOAT_BYTES
    player.overhead_s = IMAGE_PASSES * images / site.machine.rates.memory_bytes_per_s
    for _ in range(STEPS):
        player.step()
    return Prediction(
        step_s=player.step_s,
        compute_s=player.compute_s,
        memory_bytes=memory_bytes(every, images, site),
        layers=tuple(player.times.values()),
    )


def _mean(way: tuple[Journey, Journey], every: int) -> tuple[Journey, Journey]:
    """Return what travels in a step on the average, where it travels in one of so many."""
    if every == 1:
        return way
    there, back = (Journey(one.seconds / every, one.num_bytes // every, one.num_messages // every) for one in way)
    return there, back


@dataclass(eq=False)
class _Job:
    """Something on the wire."""

    left_s: float
    slows: float
    """Seconds by which the bytes of a second of it lengthen the computation beside it."""
    priority: int
    not_before: float = 0.0
    """When it arrives at the earliest, as others send it late."""

    @property
    def done(self) -> bool:
        return self.left_s <= 0.0


@dataclass
class _Wire:
    """The clock, and what is under way; the most urgent travels, the oldest of equals."""

    overlap: bool
    rates: Rates
    segment_s: float
    now: float = 0.0
    jobs: list[_Job] = field(default_factory=list)

    def start(self, journey: Journey, priority: int, stall_s: float = 0.0) -> _Job:
        """Put something on the wire; what it overtakes has some messages out already, which it waits for."""
        slows = journey.num_bytes * self.rates.beside_s_per_byte / journey.seconds if journey.seconds else 0.0
        job = _Job(journey.seconds, slows, priority, self.now + stall_s if journey.seconds else 0.0)
        for passed in [other for other in self.jobs if other.priority > priority and not job.done]:
            ahead = min(passed.left_s, self.segment_s)
            passed.left_s -= ahead
            job.left_s += ahead
        if not job.done:
            self.jobs.append(job)
            self.jobs.sort(key=lambda one: one.priority)
        return job

    def compute(self, seconds: float) -> float:
        """Compute for so long, and longer beside messages; return how long it was."""
        begin, pace = self.now, self.rates.pace_beside
        while self.overlap and self.jobs and seconds > 0.0:
            job = self.jobs[0]
            slower = 1.0 + min(1.0, self.rates.beside_share + job.slows * pace)
            passing = min(job.left_s / pace, seconds * slower)
            seconds -= passing / slower
            self._pass(job, passing, pace)
        self.now += max(0.0, seconds)
        return self.now - begin

    def wait(self, awaited: Sequence[_Job]) -> float:
        """Wait until all of `awaited` have arrived, and return how long that took."""
        begin = self.now
        while any(not job.done for job in awaited):
            self._pass(self.jobs[0], self.jobs[0].left_s)
        until = max((job.not_before for job in awaited), default=0.0)
        while self.jobs and self.now < until:
            self._pass(self.jobs[0], min(self.jobs[0].left_s, until - self.now))
        self.now = max(self.now, until)
        return self.now - begin

    def _pass(self, job: _Job, seconds: float, pace: float = 1.0) -> None:
        self.now += seconds
        job.left_s -= pace * seconds
        if job.left_s <= 1e-12:
            job.left_s = 0.0
            self.jobs.remove(job)


@dataclass(eq=False)
class _Carrier:
    """What `parallel.exchange.Carrier` does, in seconds."""

    bucket: Bucket
    reduce: Journey
    publish: Journey
    update_s: float
    priority: int
    missing: int = 0
    in_use: int = 0
    pending: bool = False
    reducing: _Job | None = None
    publishing: _Job | None = None


class _Player:
    """Plays steps: the events of `parallel.program` and `parallel.exchange`, in their order."""

    def __init__(
        self,
        model: ModelSpec,
        every: Sequence[LayerWork],
        buckets: Sequence[Bucket],
        ways: Sequence[tuple[Journey, Journey]],
        loss: tuple[Journey, Journey],
        site: Site,
    ) -> None:
        self._model, self._works, self._loss, self._lazy = model, every, loss, site.overlap and site.lazy
        link = site.machine.link(same_node=len(set(site.nodes)) == 1)
        rates = site.machine.rates
        self._layer_s = rates.layer_s
        self._stall_s = site.machine.stall_s if site.ranks > 1 else 0.0
        segment = site.machine.segment_bytes(single_node=len(set(site.nodes)) == 1)
        ahead_s = SEGMENTS * segment * link.beta_s_per_byte
        self._wire = _Wire(site.overlap, rates, ahead_s)
        order = {layer.name: index for index, layer in enumerate(model.layers)}
        self._carriers = []
        for bucket, (reduce, publish) in zip(buckets, ways, strict=True):
            replicas = max(1, site.ranks // bucket.cut)
            owned = bucket.size / (1 if bucket.kind == "allreduce" else replicas)
            update_s = owned * UPDATE_BYTES / rates.update_bytes_per_s
            self._carriers.append(_Carrier(bucket, reduce, publish, update_s, order[bucket.layers[-1]]))
        self._of = {name: carrier for carrier in self._carriers for name in carrier.bucket.layers}
        self._below = _trained_below(model)
        self._totals = site.summed(4, site.nodes, 8, "butterfly")
        self.overhead_s = 0.0
        self.step_s = self.compute_s = 0.0
        self.times: dict[str, LayerTime] = {}

    def step(self) -> None:
        """Play one step."""
        begin, wire = self._wire.now, self._wire
        self.compute_s, self.times = 0.0, {work.name: LayerTime(name=work.name) for work in self._works}
        self._compute(self._works[0].name, self.overhead_s)
        for work in self._works:
            self._forward(work)
        last = self._works[-1].name
        self._wait(last, [wire.start(self._loss[0], URGENT, self._stall_s)])
        totals = wire.start(self._totals, URGENT)
        for carrier in self._carriers:
            carrier.missing = carrier.in_use = len(carrier.bucket.layers)
            carrier.pending = True
        returning = {last: [wire.start(self._loss[1], URGENT, self._stall_s)]}
        for work, layer in zip(reversed(self._works), reversed(self._model.layers), strict=True):
            self._backward(work, layer, returning)
        self._wait(last, [totals])
        if not self._lazy:
            for carrier in reversed(self._carriers):
                self._finish(carrier, carrier.bucket.layers[-1])
        self.step_s = wire.now - begin
        for carrier in self._carriers:
            share = self.times[carrier.bucket.layers[0]]
            share.num_bytes += carrier.reduce.num_bytes + carrier.publish.num_bytes
            share.num_messages += carrier.reduce.num_messages + carrier.publish.num_messages

    def _forward(self, work: LayerWork) -> None:
        wire, name = self._wire, work.name
        fetched, inside = wire.start(work.there, URGENT, self._stall_s), work.inside if wire.overlap else 0.0
        if name in self._of:
            self._move_arrived()
            self._finish(self._of[name], name)
        self._compute(name, inside * work.passes.forward)
        self._wait(name, [fetched])
        self._wait(name, [wire.start(work.sums[0], URGENT, self._stall_s)])
        self._compute(name, (1 - inside) * work.passes.forward + self._layer_s)
        time = self.times[name]
        for journey in (work.there, work.back, *work.sums):
            time.num_bytes += journey.num_bytes
            time.num_messages += journey.num_messages

    def _backward(self, work: LayerWork, layer: LayerSpec, returning: dict[str, list[_Job]]) -> None:
        wire, name, passes = self._wire, work.name, work.passes
        if name not in self._below:
            return
        self._wait(name, returning.pop(name, []))
        self._compute(name, passes.error + self._layer_s)
        wants_input = self._below.intersection(layer.inputs)
        moved_first = bool(work.back.seconds)
        carrier = self._of.get(name)
        joint = isinstance(layer, BatchNormSpec)
        if not joint:
            self._wait(name, [wire.start(work.sums[1], URGENT, self._stall_s)])
        if not moved_first:
            self._weight(name, passes, carrier)
        if wants_input or joint:
            if joint:
                self._wait(name, [wire.start(work.sums[1], URGENT, self._stall_s)])
            self._compute(name, passes.input)
            if wants_input:
                job = wire.start(work.back, URGENT, self._stall_s)
                for source in layer.inputs:
                    returning.setdefault(source, []).append(job)
        if moved_first:
            self._weight(name, passes, carrier)
        if carrier is not None:
            carrier.in_use -= 1
            self._move_arrived()

    def _weight(self, name: str, passes: Passes, carrier: _Carrier | None) -> None:
        if carrier is None:
            return
        if carrier.bucket.kind != "factors":
            self._compute(name, passes.weight)
        carrier.missing -= 1
        if carrier.missing == 0:
            carrier.reducing = self._wire.start(carrier.reduce, carrier.priority)

    def _move_arrived(self) -> None:
        if not self._wire.overlap:
            return
        for carrier in reversed(self._carriers):
            if carrier.pending and carrier.in_use == 0 and carrier.reducing is not None and carrier.reducing.done:
                self._publish(carrier)

    def _publish(self, carrier: _Carrier) -> None:
        seconds = carrier.update_s
        if carrier.bucket.kind == "factors":  # the slice of the global gradient is made here
            seconds += next(work.passes.weight for work in self._works if work.name == carrier.bucket.layers[0])
        self._compute(carrier.bucket.layers[0], seconds)
        carrier.publishing = self._wire.start(carrier.publish, carrier.priority)
        carrier.pending = False

    def _finish(self, carrier: _Carrier, name: str) -> None:
        if carrier.pending and carrier.reducing is not None:
            self._wait(name, [carrier.reducing])
            self._publish(carrier)
        if carrier.publishing is not None:
            self._wait(name, [carrier.publishing])

    def _compute(self, name: str, seconds: float) -> None:
        if seconds:
            took = self._wire.compute(seconds)
            self.times[name].compute_s += took
            self.compute_s += took

    def _wait(self, name: str, jobs: Sequence[_Job]) -> None:
        self.times[name].exposed_s += self._wire.wait(jobs)


def _trained_below(model: ModelSpec) -> set[str]:
    """Return the layers whose outputs' gradients are wanted: those with parameters at or under them."""
    found: set[str] = set()
    for layer in model.layers:
        if layer.parameters or found.intersection(layer.inputs):
            found.add(layer.name)
    return found
