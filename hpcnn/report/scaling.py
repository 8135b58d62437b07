"""A picture of a scaling study: speed-up beside the ideal and the prediction, efficiency, and what steps consist of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hpcnn.errors import DataError
from hpcnn.report.allreduce import require_matplotlib

FORMATS = ("svg", "png")


class Interval(Protocol):
    """A mean and the half width of its confidence interval, None where it is not known."""

    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def half_width(self) -> float | None: ...  # noqa: D102


class Summary(Protocol):
    """One contender (plan, exchange and algorithm) on one number of ranks."""

    @property
    def contender(self) -> str: ...  # noqa: D102
    @property
    def ranks(self) -> int: ...  # noqa: D102
    @property
    def step_s(self) -> Interval: ...  # noqa: D102
    @property
    def speedup(self) -> Interval: ...  # noqa: D102
    @property
    def efficiency(self) -> Interval: ...  # noqa: D102
    @property
    def compute_s(self) -> float: ...  # noqa: D102
    @property
    def exposed_comm_s(self) -> float: ...  # noqa: D102
    @property
    def predicted_speedup(self) -> float | None: ...  # noqa: D102


def plot_scaling(summaries: Sequence[Summary], stem: Path, title: str) -> list[Path]:
    """Write the picture as SVG and PNG and return their paths.

    Parameters
    ----------
    summaries : sequence of Summary
        At least one. A contender alone on the fewest ranks is where the lines of all others start too.
    stem : Path
        The files' path without suffix.
    title : str
        Stands above.

    Raises
    ------
    DataError
        If matplotlib is missing or a file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    bars_height = 1.5 + 0.25 * len(summaries)
    figure = Figure(figsize=(9, 8 + bars_height), layout="constrained")
    speedup, efficiency, split = figure.subplots(3, 1, height_ratios=(4.5, 3.5, bars_height))
    ranks = sorted({summary.ranks for summary in summaries})
    speedup.plot(ranks, ranks, color="gray", linewidth=1, label="ideal")
    efficiency.axhline(1.0, color="gray", linewidth=1)
    lines = _lines(summaries)
    for number, (name, line) in enumerate(lines.items()):
        _plot_line(speedup, line, "speedup", f"C{number}", name)
        _plot_line(efficiency, line, "efficiency", f"C{number}", name)
        known = [(one.ranks, one.predicted_speedup) for one in line if one.predicted_speedup is not None]
        if known:
            speedup.plot(*zip(*known), linestyle="--", linewidth=1, color=f"C{number}")
    if any(summary.predicted_speedup is not None for summary in summaries):
        speedup.plot([], [], "k--", linewidth=1, label="predicted")
    speedup.set(title=title, ylabel="speed-up")
    speedup.legend()
    efficiency.set(xlabel="ranks", ylabel="efficiency", ylim=(0.0, None))
    for axes in (speedup, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(number) for number in ranks])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    speedup.set_yscale("log", base=2)
    speedup.yaxis.set_major_formatter("{x:g}")
    # Intervals of two or three noisy runs reach down to nothing, which a logarithmic axis has no end for.
    speedup.set_ylim(
        bottom=0.7 * min(1.0, *(min(one.speedup.value, one.predicted_speedup or 1.0) for one in summaries))
    )
    _plot_split(split, summaries)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    try:
        for path in paths:
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"plot: cannot write '{path}': {error}.") from None
    return paths


def _lines(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Return the contenders' points; one alone on the fewest ranks is where all of them start."""
    lines: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda one: one.ranks):
        lines.setdefault(summary.contender, []).append(summary)
    fewest = min(summary.ranks for summary in summaries)
    first = [summary for summary in summaries if summary.ranks == fewest]
    if len(first) == 1 and len(lines) > 1:
        own = lines[first[0].contender]
        if own == first:  # it has nothing else to show
            del lines[first[0].contender]
        for line in lines.values():
            if line[0] is not first[0]:
                line.insert(0, first[0])
    return lines


def _plot_line(axes: Any, line: Sequence[Summary], name: str, color: str, label: str) -> None:
    values = [getattr(one, name) for one in line]
    axes.errorbar(
        [one.ranks for one in line],
        [one.value for one in values],
        yerr=[one.half_width or 0.0 for one in values],
        marker=".", capsize=3, color=color, label=label,
    )  # fmt: skip


def _plot_split(axes: Any, summaries: Sequence[Summary]) -> None:
    """Draw a bar for every point: computing, waiting for messages, and the rest of the step."""
    labels = [f"{one.contender}, {one.ranks} rank{'s' * (one.ranks > 1)}" for one in summaries]
    compute = [1e3 * one.compute_s for one in summaries]
    exposed = [1e3 * one.exposed_comm_s for one in summaries]
    rest = [max(0.0, 1e3 * one.step_s.value - a - b) for one, a, b in zip(summaries, compute, exposed, strict=True)]
    left = [0.0] * len(summaries)
    for widths, label in ((compute, "compute"), (exposed, "exposed communication"), (rest, "images and the rest")):
        axes.barh(labels, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
