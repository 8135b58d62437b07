"""How a run ended, in a few lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcnn.train.evaluate import Score
from hpcnn.train.metrics import Summary


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    stopped: str
    """The signal that ended it early, or nothing."""
    score: Score | None
    summary: Summary | None

    def describe(self) -> str:
        """Return a few lines for people: what was reached, how fast, and where it lies."""
        lines = []
        if self.summary is not None:
            speed = self.summary
            hidden = speed.hidden_comm_share
            of_it = "" if hidden is None else f" ({hidden:.0%} of all was hidden)"
            lines.append(
                f"{self.step} steps, {speed.images_per_second:.0f} images/s: {1e3 * speed.step_s:.1f} ms a step,"
                f" {speed.compute_share:.0%} compute, {speed.exposed_comm_share:.0%} exposed communication"
                f"{of_it}, {speed.input_wait_share:.0%} waiting for images"
            )
        if self.score is not None:
            lines.append(f"test accuracy {self.score.accuracy:.4f}, test loss {self.score.loss:.4f}")
        if self.stopped:
            lines.append(f"stopped by {self.stopped} after step {self.step}; go on with --resume --out {self.folder}")
        lines.append(f"run folder {self.folder}")
        return "\n".join(lines)
