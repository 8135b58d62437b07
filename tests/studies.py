"""Scaling studies whose runs are written down rather than made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcnn.analysis.scaling_point import POINTS, Point
from hpcnn.train.metrics import MetricsWriter


def finish(folder: Path, point: Point, step_s: Sequence[float], *, stopped: str = "", ranks: int | None = None) -> Path:
    """Leave in a point's folder what a run of it would, with steps of these lengths; return that folder."""
    home = folder / POINTS / point.name
    (home / "plan.toml").write_text(f"ranks = {ranks or point.ranks}\n")
    (home / "metrics.jsonl").unlink(missing_ok=True)
    with MetricsWriter(home) as metrics:
        for number, seconds in enumerate(step_s, 1):
            metrics.write(
                "step", number, step_s=seconds, compute_s=0.75 * seconds, exposed_comm_s=0.2 * seconds,
                input_wait_s=0.05 * seconds, bytes_sent=1000 * (point.ranks - 1),
            )  # fmt: skip
        metrics.write("end", len(step_s), stopped=stopped, peak_memory_bytes=10**8 + point.ranks)
    return home
