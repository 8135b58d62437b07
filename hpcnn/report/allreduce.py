"""A picture of all-reduce times over message sizes: what was measured, what was predicted, and what auto took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hpcnn.errors import DataError


class Point(Protocol):
    """One algorithm at one message size."""

    @property
    def num_ranks(self) -> int: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102
    @property
    def algorithm(self) -> str: ...  # noqa: D102
    @property
    def median_s(self) -> float: ...  # noqa: D102
    @property
    def fastest_s(self) -> float: ...  # noqa: D102
    @property
    def predicted_s(self) -> float | None: ...  # noqa: D102


def require_matplotlib() -> None:
    """Raise DataError where there is nothing to draw with; better before a long measurement than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DataError("plot: matplotlib is not installed; pip install 'hpcnn[plots]'.") from None


def plot_allreduce(points: Sequence[Point], path: Path, title: str = "") -> None:
    """Write the picture: medians as lines, predictions dashed in the same colour, auto as rings around what it took.

    Below, the same times by the best of ours at each size, where differences between algorithms show.

    Parameters
    ----------
    points : sequence of Point
        Rows of `hpcnn bench allreduce`.
    path : Path
        Picture file; its suffix gives the format.
    title : str
        Stands above; default: the number of ranks.

    Raises
    ------
    DataError
        If matplotlib is missing or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    best = {
        size: min(p.median_s for p in points if p.num_bytes == size and p.algorithm not in ("mpi", "auto"))
        for size in {p.num_bytes for p in points if p.algorithm not in ("mpi", "auto")}
    }
    for number, name in enumerate(dict.fromkeys(p.algorithm for p in points)):
        some = [p for p in points if p.algorithm == name]
        sizes = [p.num_bytes for p in some]
        if name == "auto":
            style = {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none", "color": "black"}
        else:
            color = "gray" if name == "mpi" else f"C{number}"
            style = {"marker": ".", "color": color, "linestyle": ":" if name == "mpi" else "-"}
        above.plot(sizes, [p.median_s * 1e3 for p in some], label=name, **style)
        below.plot(
            [p.num_bytes for p in some if p.num_bytes in best],
            [p.median_s / best[p.num_bytes] for p in some if p.num_bytes in best],
            **style,
        )
        if name not in ("mpi", "auto"):
            known = [(p.num_bytes, p.predicted_s * 1e3) for p in some if p.predicted_s is not None]
            above.plot(*zip(*known), linestyle="--", linewidth=1, color=color)
    above.plot([], [], "k--", linewidth=1, label="predicted")
    above.set(xscale="log", yscale="log", ylabel="milliseconds (median)")
    above.set_title(title or f"all-reduce over {points[0].num_ranks} ranks")
    above.legend()
    below.set(xlabel="bytes", ylabel="time / best of ours", ylim=(0.5, 3.0))
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(f"plot: cannot write '{path}': {error}.") from None
