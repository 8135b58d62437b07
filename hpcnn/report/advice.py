"""Where the time of a run went, in sentences, and what to try next: only what follows from measured numbers."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median, quantiles
from typing import NamedTuple

from hpcnn.report.run import Run
from hpcnn.report.untrusted import is_number
from hpcnn.report.words import milliseconds, quantity
from hpcnn.spec import LinearSpec, ModelSpec
from hpcnn.train.metrics import Summary

MUCH_EXPOSED, LITTLE_EXPOSED = 0.15, 0.05
"""Parts of the step in which a rank waits for others: worth a change, and not worth one."""
MUCH_INPUT = 0.05
"""Part of the step in which a rank waits for images that is worth a change."""
MUCH_BETWEEN = 0.15
"""Part of a traced step outside of layers and waits."""
UNEQUAL = 0.10
"""By how much the slowest rank computes longer than the mean one."""
UNSTEADY = 2.0
"""Slowest twentieth of the steps over the middle one."""
MANY_IN_LINEAR = 0.5
"""Part of the parameters in fully connected layers from which on `hybrid` saves most of the traffic."""
FEW_IMAGES = 8
"""Images a rank and step: with fewer, layers are too small to be computed at full speed."""


class Advice(NamedTuple):
    """What was measured, what to try, and a setting that does it, if one does."""

    finding: str
    remedy: str
    setting: str = ""


def describe(run: Run) -> str:
    """Return in a sentence or two where the time went."""
    speed = run.summary
    if speed is None:
        return "No step has been measured."
    hidden = speed.hidden_comm_share
    shares = [
        (speed.compute_share, "computing"),
        (speed.exposed_comm_share, "waiting for other ranks"),
        (speed.input_wait_share, "waiting for images"),
        (speed.other_share, "in the rest"),
    ]
    spent = ", ".join(f"{share:.0%} {what}" for share, what in shares if round(share, 2))
    of_it = (
        ""
        if hidden is None or not speed.bytes_per_step
        else f" Of all communication {hidden:.0%} ran hidden behind the computation."
    )
    return f"A step took {milliseconds(speed.step_s)} ms: {spent}.{of_it}"


def advise(run: Run, model: ModelSpec | None) -> list[Advice]:
    """Return what to try next, what promises most first."""
    speed = run.summary
    if speed is None:
        return []
    found = [*_crowded(run)]
    unequal = [] if found else [*_unequal(run)]  # ranks that take turns compute unequally long for that reason alone
    between = [] if found else [*_between(run)]
    found += [*unequal, *_exposed(run, speed, model), *_input(run, speed), *between, *_unsteady(run)]
    if not found and speed.exposed_comm_share <= LITTLE_EXPOSED:
        found += _computing(run, speed)
    return found


def _crowded(run: Run) -> Iterator[Advice]:
    hosts = run.fact("hosts")
    for host in hosts if isinstance(hosts, list) else ():
        ranks, threads, cores = (host.get(name) if isinstance(host, dict) else None for name in _HOST)
        if is_number(ranks) and is_number(threads) and is_number(cores) and 0 < cores < threads:
            most = cores // ranks if ranks else 0
            yield Advice(
                f"{host.get('host')}: {ranks} ranks run {threads} threads on {cores} cores, so they take turns, and who"
                " waits for others often waits for a core.",
                f"Use {most} threads a rank." if most else f"Start at most {cores} ranks there.",
                f"OMP_NUM_THREADS={most}" if most else "",
            )
            return


_HOST = ("ranks", "threads", "cores")


def _unequal(run: Run) -> Iterator[Advice]:
    times = run.trace.rank_times() if run.trace else []
    if len(times) < 2:
        return
    mean_s, slowest = fmean(time.compute_s for time in times), max(times, key=lambda time: time.compute_s)
    if mean_s and slowest.compute_s > (1 + UNEQUAL) * mean_s:
        yield Advice(
            f"Ranks compute unequally long in the traced steps: {slowest.name} {milliseconds(slowest.compute_s)} ms a"
            f" step, the mean rank {milliseconds(mean_s)} ms. The others wait for it, whatever the network does.",
            "Look for other programs on its node, a core too few, or a plan that gives it more (an uneven batch, uneven"
            " tiles); `hpcnn doctor` under the same launcher shows each rank's cores.",
        )


def _exposed(run: Run, speed: Summary, model: ModelSpec | None) -> Iterator[Advice]:
    share, config = speed.exposed_comm_share, run.config
    if share < MUCH_EXPOSED or config is None or not speed.bytes_per_step:
        return
    sent = quantity(speed.bytes_per_step, "B")
    finding = f"{share:.0%} of the step is exposed communication; rank 0 sends {sent} a step."
    if not config.exchange.overlap:
        yield Advice(finding, "Let messages travel behind the computation.", "exchange.overlap=true")
        return
    linear = _linear_share(model)
    if config.plan.preset == "data" and linear >= MANY_IN_LINEAR:
        yield Advice(
            finding + f" {linear:.0%} of the parameters belong to fully connected layers.",
            "Split these layers, so that their gradients need not travel.",
            "plan.preset=hybrid",
        )
    elif config.plan.preset != "auto":
        yield Advice(finding, "Let the planner look for a split that sends less.", "plan.preset=auto")
    if config.exchange.kind == "allreduce":
        yield Advice(
            "Gradients are summed on all ranks in one go."
            if linear >= MANY_IN_LINEAR or config.plan.preset != "auto"
            else finding,
            "Let each bucket travel the cheapest way: sharded exchange hides half of it behind the next forward.",
            "exchange.kind=auto",
        )
    if not config.exchange.machine:
        yield Advice(
            "No machine file was given, so algorithms were chosen for an ordinary cluster.",
            "Measure this one: `mpiexec -n RANKS hpcnn profile --out machine.toml`, then set",
            "exchange.machine=machine.toml",
        )


def _linear_share(model: ModelSpec | None) -> float:
    """Return the part of the parameters in fully connected layers, 0 where the model is not known."""
    if model is None or not model.num_parameters:
        return 0.0
    return sum(layer.num_parameters for layer in model.layers if isinstance(layer, LinearSpec)) / model.num_parameters


def _input(run: Run, speed: Summary) -> Iterator[Advice]:
    if speed.input_wait_share >= MUCH_INPUT:
        prefetch = run.config.data.prefetch if run.config else 0
        yield Advice(
            f"{speed.input_wait_share:.0%} of the step is waiting for images.",
            "Read more batches ahead; if that does not help, put the images on a faster file system.",
            f"data.prefetch={max(4, 2 * prefetch)}",
        )


def _between(run: Run) -> Iterator[Advice]:
    times = run.trace.rank_times() if run.trace else []
    total = sum(sum(time[1:]) for time in times)
    share = sum(time.other_s for time in times) / total if total else 0.0
    if share < MUCH_BETWEEN or run.config is None:
        return
    images = run.config.train.global_batch / len(times)
    few = f" A rank has {images:.3g} images a step." if images <= FEW_IMAGES else ""
    yield Advice(
        f"In the traced steps {share:.0%} of the time lies between the layers, in bookkeeping that does not grow with"
        f" the batch.{few}",
        "More images a step make it count less: a larger batch, or fewer ranks.",
        f"train.global_batch={2 * run.config.train.global_batch}",
    )


def _unsteady(run: Run) -> Iterator[Advice]:
    times = [step["step_s"] for step in run.steps[len(run.steps) // 2 :] if step.get("step_s")]
    if len(times) < 40:
        return
    middle, slow = median(times), quantiles(times, n=20)[-1]
    if slow > UNSTEADY * middle:
        yield Advice(
            f"Steps are unsteady: one of twenty takes more than {milliseconds(slow)} ms, the middle one"
            f" {milliseconds(middle)} ms.",
            "Look for other jobs on the nodes or the network; ask the batch system for whole nodes.",
        )


def _computing(run: Run, speed: Summary) -> Iterator[Advice]:
    """Yield what makes a run faster that hardly waits."""
    finding = f"{speed.compute_share:.0%} of the step is arithmetic, and the ranks hardly wait for each other."
    if str(run.fact("operators", "implementation") or "").startswith("numpy"):
        yield Advice(finding, "Layers are computed by NumPy: install oneDNN.", "pip install 'hpcnn[onednn]'")
        return
    yield Advice(finding, "More ranks are likely to help: `hpcnn plan` predicts the step for other numbers of ranks.")
