"""Pictures of an information plane: the plane, the two inequalities over time, and what feature maps tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpcnn.errors import DataError
from hpcnn.report.allreduce import require_matplotlib


class Record(Protocol):
    """What is drawn: `analysis.plane_file.Plane`."""

    @property
    def attributes(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def layers(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def columns(self) -> Mapping[str, np.ndarray]: ...  # noqa: D102


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw all that the record has, as SVG and PNG, and return the files.

    Raises
    ------
    DataError
        If matplotlib is missing or a file cannot be written.
    """
    require_matplotlib()
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(record):
            for suffix in (".svg", ".png"):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=150)
                written.append(path)
    except OSError as error:
        raise DataError(f"plot: cannot write into '{folder}': {error}.") from None
    return written


def _figures(record: Record) -> Iterator[tuple[str, Any]]:
    yield "information-plane", _plane(record)
    yield "inequalities", _inequalities(record)
    if any(name.startswith("maps/") for name in record.columns):
        yield "feature-maps", _maps(record)


def _plane(record: Record) -> Any:
    """Return the plane: a path for each layer, dark when training begins and bright when it ends."""
    figure, (axes,) = _new(1, 1)
    columns, markers = record.columns, "osD^vP*X<>"
    steps = columns["step"]
    points = None
    for index, layer in enumerate(record.layers):
        x, y = columns["I_x"][:, index], columns["I_y"][:, index]
        axes.plot(x, y, color="gray", linewidth=0.6, alpha=0.5, zorder=1)
        marker = markers[index % len(markers)]
        points = axes.scatter(x, y, c=steps, cmap="viridis", marker=marker, s=22, label=layer, zorder=2)
    axes.axhline(record.attributes["S_labels"], color="black", linestyle=":", linewidth=1, label="S(Y)")
    axes.set(xlabel="I(X; T), bits", ylabel="I(T; Y), bits")
    axes.legend()
    figure.colorbar(points, label="step")
    return figure


def _inequalities(record: Record) -> Any:
    """Return both chains of information over the steps; where lines cross, an inequality fails."""
    columns, has_errors = record.columns, "errors/I_top" in record.columns
    figure, (forward, *others) = _new(2 if has_errors else 1, 1)
    steps = columns["step"]
    for index, layer in enumerate(record.layers):
        forward.plot(steps, columns["I_x"][:, index], label=layer)
    forward.set(ylabel="I(X; T), bits", title="forward: no layer should lie above the one before")
    for axes in others:
        for index in reversed(range(len(record.layers) - 1)):
            axes.plot(steps, columns["errors/I_top"][:, index], label=record.layers[index], color=f"C{index}")
        axes.set(ylabel=f"I(error of {record.layers[-1]}; error), bits", title="backward: nor above the one behind")
    for axes in (forward, *others):
        axes.set(xlabel="step", ylim=(0, None))
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    return figure


def _maps(record: Record) -> Any:
    """Return, for each layer with feature maps: pairs over time, and information as maps are added."""
    columns = record.columns
    layers = [layer for layer in record.layers if f"maps/{layer}/sizes" in columns]
    figure, panels = _new(2, len(layers))
    for layer, above, below in zip(layers, panels[: len(layers)], panels[len(layers) :], strict=True):
        steps = columns["maps/step"]
        for name, words in (("redundancy_synergy", "redundancy - synergy"), ("non_redundant", "non-redundant")):
            values = columns[f"maps/{layer}/{name}"]
            above.plot(steps, values.mean(axis=1), label=words)
            above.fill_between(steps, values.min(axis=1), values.max(axis=1), alpha=0.2)
        above.axhline(0, color="black", linewidth=0.6)
        above.set(xlabel="step", ylabel="bits, mean and range of pairs", title=f"{layer}: pairs of maps")
        sizes, growing = columns[f"maps/{layer}/sizes"], columns[f"maps/{layer}/growing_I_x"]
        single = columns[f"maps/{layer}/single_I_x"][:, :1]
        for index in sorted({0, len(steps) // 2, len(steps) - 1}):
            line = np.concatenate([single[index], growing[index]])
            below.plot([1, *sizes], line, marker=".", label=f"step {steps[index]}")
        below.set(xlabel="maps taken together", ylabel="I(X; maps), bits", ylim=(0, None))
        for axes in (above, below):
            axes.grid(visible=True, alpha=0.3)
            axes.legend()
    return figure


def _new(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 4.5 * columns), 5.0 * rows if rows == 1 else 4.0 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())
