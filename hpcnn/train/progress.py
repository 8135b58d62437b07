"""What a run says while it runs, on one rank only: a bar on a terminal, plain lines in a batch log.

Progress (bar, step lines, messages) goes to one stream, standard error in the command line, and the results of epochs
to another, standard output, so that `hpcnn train ... > result.txt` keeps the results alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO

# Values that are shown, in this order.
_SHOWN = {
    "loss": "loss {:.4f}",
    "accuracy": "acc {:.4f}",
    "test_loss": "test loss {:.4f}",
    "test_accuracy": "test acc {:.4f}",
    "images_per_second": "{:.0f} img/s",
    "lr": "lr {:.4g}",
}


class Progress:
    """Reports the steps of one count after another, such as a training or an evaluation. A context manager.

    Parameters
    ----------
    stream : text file or None
        Where progress goes; a bar is drawn when it is a terminal and tqdm is installed, lines otherwise. None, which
        is what other ranks pass: nothing is ever written.
    results : text file or None
        Where epoch lines go; None: nowhere.
    every_seconds : float
        Plain lines come at most so often. The first and the last step always have one.
    clock : callable
        Seconds; for tests.
    """

    def __init__(
        self,
        stream: TextIO | None,
        results: TextIO | None = None,
        *,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._results = results
        self._every_seconds = every_seconds
        self._clock = clock
        self._bar: Any = None
        self.start(0)

    def start(self, total: int, *, initial: int = 0, label: str = "train") -> None:
        """Begin a count from `initial`, the steps made before by the run that this one resumes, to `total`."""
        self.close()
        self._total, self._initial, self._label = total, initial, label
        self._start_s = self._next_line_s = self._clock()
        if total and self._stream is not None and self._stream.isatty():
            self._bar = _bar(self._stream, total, initial, label)

    def step(self, done: int, **values: float | None) -> None:
        """Report that `done` of the total are done; shown are loss, accuracy, images_per_second and lr."""
        if self._stream is None:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_shown(values)), refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if now < self._next_line_s and done != self._total:
            return
        self._next_line_s = now + self._every_seconds
        self.message("  ".join([f"{self._label} {done}/{self._total}", *_shown(values), *self._left(done, now)]))

    def epoch(self, epoch: int, **values: float | None) -> None:
        """Write the results of an epoch: test_accuracy, test_loss, and whatever `step` shows."""
        self._line(self._results, "  ".join([f"epoch {epoch}", *_shown(values)]))

    def message(self, text: str) -> None:
        """Write a line of text to the progress stream, above the bar where there is one."""
        self._line(self._stream, text)

    def close(self) -> None:
        """End the bar and leave its last state on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, stream: TextIO | None, text: str) -> None:
        if stream is None:
            return
        if self._bar is not None:
            self._bar.clear()
        # A log on a full disk, or a terminal that is gone: no reason to end a run.
        with suppress(OSError):
            stream.write(text + "\n")
            stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    def _left(self, done: int, now: float) -> list[str]:
        """Return the time that is left at the pace so far; nothing before there is one."""
        made, elapsed = done - self._initial, now - self._start_s
        if made < 1 or elapsed <= 0.0 or done >= self._total:
            return []
        seconds = round(elapsed / made * (self._total - done))
        return [f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"]


def _bar(stream: TextIO, total: int, initial: int, label: str) -> Any:
    """Return a tqdm bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm  # on one rank only
    except ImportError:
        return None
    return tqdm(total=total, initial=initial, desc=label, unit="step", file=stream, dynamic_ncols=True, leave=True)


def _shown(values: Mapping[str, Any]) -> list[str]:
    return [text.format(values[name]) for name, text in _SHOWN.items() if values.get(name) is not None]
