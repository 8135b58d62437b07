"""The table of a scaling study: a row for each run, and what the repeats of a point amount to."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from hpcnn.analysis import confidence
from hpcnn.analysis.confidence import Estimate
from hpcnn.analysis.scaling_point import POINT, POINTS, Point, read_point, status
from hpcnn.errors import DataError
from hpcnn.train import metrics
from hpcnn.train.atomic import replacing

FILE = "scaling.csv"
WARM_UP_STEPS = 2
"""Left out of every median: the first steps fill caches and memory pools, and meet no exchange of an earlier step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Point):
    """A run and what it measured; None where it is not finished. Times are medians over its settled steps."""

    step_s: float | None = None
    compute_s: float | None = None
    """Of rank 0, as are `exposed_comm_s`, `input_wait_s` and `bytes_sent`."""
    exposed_comm_s: float | None = None
    input_wait_s: float | None = None
    images_per_second: float | None = None
    memory_bytes: int | None = None
    """Largest resident set of any rank."""
    device_memory_bytes: int | None = None
    """Largest memory of arrays on any rank's GPU; None without GPUs."""
    bytes_sent: float | None = None
    status: str
    reason: str = ""


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """All repeats of a point."""

    mode: str
    plan: str
    exchange: str
    algorithm: str
    ranks: int
    global_batch: int
    repeats: int
    step_s: Estimate
    speedup: Estimate
    """Over the study's base: by images a second, and the base's number of ranks if that is not 1."""
    compute_s: float
    exposed_comm_s: float
    images_per_second: float
    memory_bytes: int
    device_memory_bytes: int | None
    bytes_sent: float
    predicted_step_s: float | None
    predicted_speedup: float | None
    """Of the predicted steps, both."""

    @property
    def contender(self) -> str:
        """What is compared over numbers of ranks."""
        return f"{self.plan}, {self.exchange}, {self.algorithm}"

    @property
    def efficiency(self) -> Estimate:
        """Speed-up over the number of ranks."""
        value, half_width = self.speedup
        return Estimate(value / self.ranks, None if half_width is None else half_width / self.ranks)


def collect(folder: Path) -> list[Row]:
    """Return a row for every run of a study.

    Raises
    ------
    DataError
        If the folder holds no study.
    """
    homes = sorted(path.parent for path in (folder / POINTS).glob(f"*/{POINT}"))
    if not homes:
        raise DataError(
            f"scale: '{folder}' holds no study; `hpcnn scale CONFIG --ranks 1,2,4 --out {folder}` makes one."
        )
    rows = [read_row(home) for home in homes]
    return sorted(rows, key=lambda row: (row.mode, row.plan, row.exchange, row.algorithm, row.ranks, row.repeat))


def read_row(home: Path) -> Row:
    """Return the row of a point's folder; raises DataError where it is none."""
    point = dataclasses.asdict(read_point(home))
    stands, reason = status(home)
    if stands != "finished":
        return Row(**point, status=stands, reason=reason)
    *records, end = metrics.read(home / metrics.FILE)
    steps = [record for record in records if record["event"] == "step"][WARM_UP_STEPS:]
    names = ("step_s", "compute_s", "exposed_comm_s", "input_wait_s", "bytes_sent")
    medians = {name: statistics.median(step[name] for step in steps) for name in names}
    return Row(
        **point,
        **medians,
        images_per_second=point["global_batch"] / medians["step_s"],
        memory_bytes=end["peak_memory_bytes"],
        device_memory_bytes=end.get("peak_device_memory_bytes"),
        status=stands,
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the table; what is not known is left empty. Raises DataError if it cannot be written."""
    try:
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(dataclasses.astuple(row) for row in rows)
    except OSError as error:
        raise DataError(f"scale: cannot write '{path}': {error.strerror}.") from None


def summarise(rows: Sequence[Row], mode: str) -> list[Summary]:
    """Return the points of one mode that have finished repeats, the base first, then by contender and ranks.

    The base of all speed-ups is the fastest point on the fewest ranks.
    """
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        if row.mode == mode and row.status == "finished":
            groups.setdefault((row.plan, row.exchange, row.algorithm, row.ranks), []).append(row)
    if not groups:
        return []
    fewest = min(ranks for *_, ranks in groups)
    base = min((some for (*_, ranks), some in groups.items() if ranks == fewest), key=_mean_step_s)
    return [_summary(some, base) for some in sorted(groups.values(), key=lambda some: some is not base)]


def _mean_step_s(rows: Sequence[Row]) -> float:
    return statistics.fmean(_values(rows, "step_s"))


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [getattr(row, name) for row in rows]


def _summary(rows: Sequence[Row], base: Sequence[Row]) -> Summary:
    first, start = rows[0], base[0]
    scale = start.ranks * first.global_batch / start.global_batch
    quotient = Estimate(1.0, None) if rows is base else confidence.ratio(*(_values(r, "step_s") for r in (base, rows)))
    predicted = None
    if first.predicted_step_s and start.predicted_step_s:
        predicted = scale * start.predicted_step_s / first.predicted_step_s
    on_device = [row.device_memory_bytes for row in rows if row.device_memory_bytes is not None]
    return Summary(
        mode=first.mode,
        plan=first.plan,
        exchange=first.exchange,
        algorithm=first.algorithm,
        ranks=first.ranks,
        global_batch=first.global_batch,
        repeats=len(rows),
        step_s=confidence.mean(_values(rows, "step_s")),
        speedup=Estimate(scale * quotient.value, quotient.half_width and scale * quotient.half_width),
        compute_s=statistics.fmean(_values(rows, "compute_s")),
        exposed_comm_s=statistics.fmean(_values(rows, "exposed_comm_s")),
        images_per_second=first.global_batch / _mean_step_s(rows),
        memory_bytes=max(row.memory_bytes or 0 for row in rows),
        device_memory_bytes=max(on_device, default=None),
        bytes_sent=statistics.fmean(_values(rows, "bytes_sent")),
        predicted_step_s=first.predicted_step_s,
        predicted_speedup=predicted,
    )
