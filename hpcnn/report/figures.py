"""The figures of a report. Each function returns a `Drawing`; call them within `drawing.style`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hpcnn.report import drawing
from hpcnn.report.drawing import DASHES, SERIES, SPLIT, new_figure, short, tooltip
from hpcnn.report.run import Run
from hpcnn.report.scale_table import ScaleTable
from hpcnn.report.traced import IMAGES, Trace, TracedSpan
from hpcnn.report.words import milliseconds
from hpcnn.train.metrics import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 300
"""A curve of more steps is drawn as means of so many stretches."""
MOST_RANKS = 16
"""Of a trace with more ranks, so many are drawn."""
THINNEST = 1 / 2500
"""Spans that are a smaller part of the step cannot be seen and are not drawn."""


class Drawing(NamedTuple):
    """A figure, the name of its files, what it shows, and the texts that a mouse finds on it."""

    figure: Figure
    key: str
    caption: str
    tips: list[str]


class Curve(NamedTuple):
    """A number of the steps over their number."""

    field: str
    label: str
    caption: str
    per_epoch: str = ""
    """A number of the epochs that is drawn as well, with marks."""


CURVES = (
    Curve("loss", "loss", "Loss of the training batches; marks: of the test images", "test_loss"),
    Curve("accuracy", "accuracy", "Accuracy on the training batches; marks: on the test images", "test_accuracy"),
    Curve("lr", "learning rate", "Learning rate"),
    Curve("images_per_second", "images per second", "Images per second, over all ranks"),
)


def curve(runs: Sequence[Run], what: Curve) -> Drawing | None:
    """Draw one number of all runs over their steps; None where no run has it."""
    figure, drawn = new_figure(), False
    axes = figure.subplots()
    for index, run in enumerate(runs):
        style: Any = {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index // len(SERIES) % len(DASHES)]}
        steps, values = thinned(run.steps, what.field)
        if steps:
            axes.plot(steps, values, label=short(run.name), **style)
        epochs = [(record["step"], record[what.per_epoch]) for record in run.epochs if what.per_epoch in record]
        if epochs:
            axes.plot(*zip(*epochs), "o", markersize=6, color=style["color"], markeredgecolor=drawing.INK)
        drawn = drawn or bool(steps or epochs)
    if not drawn:
        return None
    axes.set(xlabel="step", ylabel=what.label)
    if what.field == "images_per_second":
        axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend()
    return Drawing(figure, what.field.replace("_", "-"), what.caption, [])


def thinned(steps: Sequence[Record], name: str, most_points: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Return steps and values of a field, as means over at most so many stretches of equally many records."""
    points = [(float(step["step"]), step[name]) for step in steps if name in step]
    width = max(1, math.ceil(len(points) / most_points))
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    return (
        [stretch[-1][0] for stretch in stretches],
        [math.fsum(value for _, value in stretch) / len(stretch) for stretch in stretches],
    )


def split_of_step(step: Record) -> dict[str, float]:
    """Return the seconds of a step in the parts of `SPLIT`."""
    known = [step.get(name, 0.0) for name in ("compute_s", "exposed_comm_s", "input_wait_s")]
    return dict(zip(SPLIT, (*known, max(0.0, step.get("step_s", 0.0) - math.fsum(known))), strict=True))


def split_over_time(run: Run, number: int) -> Drawing | None:
    """Draw how the steps of a run are made up, over their number."""
    parts = [
        {"step": step["step"], **{name: 1e3 * value for name, value in split_of_step(step).items()}}
        for step in run.steps
        if step.get("step_s")
    ]
    if not parts:
        return None
    figure = new_figure()
    axes = figure.subplots()
    columns = [thinned(parts, name, MOST_POINTS // 3) for name in SPLIT]
    steps = columns[0][0]
    if len(steps) == 1:  # an area over one point cannot be seen
        steps, columns = [steps[0], steps[0] + 1], [(steps, values * 2) for steps, values in columns]
    axes.stackplot(steps, *(values for _, values in columns), labels=list(SPLIT), colors=list(SPLIT.values()), lw=0)
    # A first step that warms everything up would press all others flat.
    totals = sorted(sum(values) for values in zip(*(values for _, values in columns), strict=True))
    axes.set_ylim(0, 1.1 * max(totals[max(0, math.ceil(0.98 * len(totals)) - 1)], 1e-9))
    axes.set(xlabel="step", ylabel="milliseconds a step", xlim=(steps[0], steps[-1]))
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    caption = "How a step is made up, on rank 0 (steps that reach beyond the frame are cut off)"
    return Drawing(figure, f"step-{number}", caption, [])


def ranks(trace: Trace, number: int) -> Drawing | None:
    """Draw how the mean traced step passes on every rank."""
    times = trace.rank_times()[: 4 * MOST_RANKS]
    if not times:
        return None
    figure, tips = new_figure(height=0.9 + 0.24 * len(times)), list[str]()
    axes = figure.subplots()
    left = [0.0] * len(times)
    for (name, color), column in zip(SPLIT.items(), zip(*(time[1:] for time in times), strict=True), strict=True):
        values = [1e3 * seconds for seconds in column]
        bars = axes.barh(range(len(times)), values, left=left, color=color, label=name, height=0.7)
        for bar, time, value in zip(bars, times, values, strict=True):
            tooltip(bar, tips, f"{time.name}: {name} {value:.3g} ms")
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    _rank_axis(axes, [time.name for time in times], [float(index) for index in range(len(times))])
    axes.set(xlabel="milliseconds of the mean traced step")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return Drawing(
        figure,
        f"ranks-{number}",
        "The mean traced step on every rank; other: between the layers. Blue of equal length is equal work",
        tips,
    )


COLORS = {
    "forward": drawing.SKY,
    "backward": drawing.BLUE,
    "update": drawing.PURPLE,
    "waiting for messages": drawing.VERMILLION,
    "waiting for images": drawing.ORANGE,
    "messages in flight": drawing.GREEN,
}


def kind_of(span: TracedSpan) -> str:
    """Return what a span is drawn as: a key of `COLORS`."""
    if span.lane == "communication":
        return "messages in flight"
    if span.lane == "wait":
        return "waiting for images" if span.name == IMAGES else "waiting for messages"
    return "update" if span.name == "update" else "forward" if " forward" in span.name else "backward"


def timeline(trace: Trace, number: int) -> Drawing | None:
    """Draw one step of all ranks: what each computes and waits for, and below it what is in flight."""
    from matplotlib.patches import Patch, Rectangle

    name = trace.typical_step()
    if name is None:
        return None
    shown = trace.ranks[:MOST_RANKS]
    window = shown[0].steps[name]
    begin, end = window.begin_s, window.end_s
    figure, tips, used = new_figure(11.0, 0.9 + 0.42 * len(shown)), list[str](), set[str]()
    axes = figure.subplots()
    for row, rank in enumerate(shown):
        for span in rank.within(window):
            first, last = max(span.begin_s, begin), min(span.end_s, end)
            if last - first < THINNEST * (end - begin) or span.lane == "input":
                continue
            kind, thread = kind_of(span), span.lane != "communication"
            low, height = (row - 0.38, 0.46) if thread else (row + 0.12, 0.24)
            box = Rectangle((1e3 * (first - begin), low), 1e3 * (last - first), height, color=COLORS[kind], lw=0)
            size = "" if span.num_bytes is None else f", {span.num_bytes:.0f} bytes sent"
            tooltip(box, tips, f"{rank.name}: {span.name}, {milliseconds(span.seconds)} ms{size}")
            axes.add_patch(box)
            used.add(kind)
    _rank_axis(axes, [rank.name for rank in shown], [float(row) for row in range(len(shown))])
    axes.set(xlabel=f"milliseconds since {name} began on {shown[0].name}", xlim=(0, max(1e3 * (end - begin), 1e-9)))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    patches = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in used]
    axes.legend(handles=patches, ncols=len(patches), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    fewer = f" (the first {MOST_RANKS} of {len(trace.ranks)} ranks)" if len(trace.ranks) > MOST_RANKS else ""
    caption = f"A typical step, {name}{fewer}: above what the rank does, below what is in flight; white: neither"
    return Drawing(figure, f"timeline-{number}", caption, tips)


def _rank_axis(axes: Any, names: Sequence[str], places: Sequence[float]) -> None:
    """Name the ranks, the first on top; of many only some."""
    every = max(1, math.ceil(len(names) / 40))
    axes.set_yticks(list(places)[::every], [short(name) for name in names][::every])
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()


def shares(runs: Sequence[Run]) -> Drawing | None:
    """Draw the parts of the step of several runs as bars of equal length."""
    measured = [(run, run.summary) for run in runs]
    rows = [(run, speed) for run, speed in measured if speed is not None]
    if not rows:
        return None
    figure, tips = new_figure(7.5, 0.9 + 0.3 * len(rows)), list[str]()
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for name, color in SPLIT.items():
        values = [
            100
            * {
                "compute": speed.compute_share,
                "exposed communication": speed.exposed_comm_share,
                "waiting for images": speed.input_wait_share,
                "other": speed.other_share,
            }[name]
            for _, speed in rows
        ]
        bars = axes.barh(range(len(rows)), values, left=left, color=color, label=name, height=0.7)
        for bar, (run, _), value in zip(bars, rows, values, strict=True):
            tooltip(bar, tips, f"{run.name}: {name} {value:.1f}%")
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    _rank_axis(axes, [run.name for run, _ in rows], [float(index) for index in range(len(rows))])
    axes.set(xlabel="per cent of the step", xlim=(0, 100))
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return Drawing(figure, "shares", "Where the time of a step went (second half of the run, rank 0)", tips)


def scaling(table: ScaleTable, number: int) -> list[Drawing]:
    """Draw speed-up, efficiency and step time of a study over the number of ranks."""
    curves = [one for one in table.curves if one.points]
    if not curves:
        return []
    every = sorted({point.ranks for one in curves for point in one.points})
    drawings = []
    for field, label, caption in (
        ("speedup", "speed-up", "Speed-up over the fastest on the fewest ranks; dotted: in proportion to the ranks"),
        ("efficiency", "efficiency", "Speed-up over the number of ranks"),
        ("step_s", "seconds a step", "Step time (mean of the repeats); thin and dotted: as predicted"),
    ):
        figure = new_figure(4.6, 3.2)
        axes = figure.subplots()
        for index, one in enumerate(curves):
            color = SERIES[index % len(SERIES)]
            dashes = DASHES[index // len(SERIES) % len(DASHES)]
            points = [(point.ranks, getattr(point, field)) for point in one.points]
            points = [(count, value) for count, value in points if value is not None]
            if points:
                axes.plot(
                    *zip(*points), label=short(one.label), color=color, linestyle=dashes, marker="o", markersize=4
                )
            if field == "step_s":
                guesses = [(p.ranks, p.predicted_step_s) for p in one.points if p.predicted_step_s is not None]
                if guesses:
                    axes.plot(*zip(*guesses), color=color, linestyle=":", linewidth=1)
        if field == "speedup":
            axes.plot(every, every, color=drawing.GREY, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(count) for count in every])
        axes.set(xlabel="ranks", ylabel=label)
        if field == "speedup":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.legend()
        drawings.append(Drawing(figure, f"scaling-{number}-{field.removesuffix('_s')}", caption, []))
    return drawings
