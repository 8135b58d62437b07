"""Simulated steps as a picture and as a table: speed-up and waiting against the number of cores, a line a series."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcnn.errors import DataError
from hpcnn.plan.simulation import Point, Simulation
from hpcnn.report.allreduce import require_matplotlib

COLUMNS = (
    "model", "plan", "kind", "algorithm", "ranks", "cores", "global_batch", "step_s", "compute_s", "exposed_s",
    "speed_up", "efficiency", "memory_bytes", "chosen_kind",
)  # fmt: skip


def write_csv(simulations: Mapping[str, Simulation], path: Path) -> None:
    """Write every point of the models' simulations as a row of a table; DataError if the file cannot be written."""
    try:
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            for model, simulation in simulations.items():
                rows.writerows(_row(model, point) for point in simulation.points)
    except OSError as error:
        raise DataError(f"simulate: cannot write '{path}': {error}.") from None


def _row(model: str, point: Point) -> tuple[object, ...]:
    predicted, series = point.prediction, point.series
    head = (model, series.plan, series.kind, series.algorithm, point.ranks, point.cores, point.global_batch)
    times = (predicted.step_s, predicted.compute_s, predicted.exposed_s, point.speed_up, point.efficiency)
    return (*head, *(f"{number:.6g}" for number in times), predicted.memory_bytes, point.kind)


def plot_simulation(
    simulations: Mapping[str, Simulation],
    paths: Sequence[Path],
    title: str = "",
    published: Mapping[str, tuple[int, float]] | None = None,
) -> None:
    """Write the picture: of each model speed-ups above, and below the part of a step in which ranks only wait.

    Parameters
    ----------
    simulations : dict of str to Simulation
        By model.
    paths : sequence of Path
        Files; their suffixes give the formats.
    title : str
        Stands above.
    published : dict of str to (cores, speed-up), optional
        Of some models, what others measured: a star.

    Raises
    ------
    DataError
        If matplotlib is missing or a file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 5.5 * len(simulations), 8), layout="constrained")
    grid = figure.subplots(2, len(simulations), sharex=True, squeeze=False, height_ratios=(3, 2))
    for column, (model, simulation) in enumerate(simulations.items()):
        above, below = grid[:, column]
        cores = sorted({point.cores for point in simulation.points})
        above.plot(cores, cores, color="gray", linestyle=":", label="linear")
        for number, series in enumerate(dict.fromkeys(point.series for point in simulation.points)):
            points = sorted(simulation.of(series), key=lambda point: point.cores)
            style = {"marker": "osD^v<>P"[number % 8], "markersize": 4, "color": f"C{number % 10}"}
            where = [point.cores for point in points]
            above.plot(where, [point.speed_up for point in points], label=series.label, **style)
            below.plot(where, [100 * p.prediction.exposed_s / p.prediction.step_s for p in points], **style)
        if published and model in published:
            above.plot(*published[model], "*", color="black", markersize=14, label="published")
        above.set(title=model, xscale="log", yscale="log", ylabel="speed-up over one core")
        below.set(xlabel="cores", ylabel="of a step only waiting (%)", ylim=(0, 100))
        above.set_xscale("log", base=2)
        above.legend(fontsize="small")
        for axes in (above, below):
            axes.grid(visible=True, alpha=0.3)
    if title:
        figure.suptitle(title)
    for path in paths:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise DataError(f"simulate: cannot write '{path}': {error}.") from None
