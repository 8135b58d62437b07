"""A run folder as a report reads it: whatever is missing, broken or hostile in it becomes a note, not an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hpcnn import bounded, configuration
from hpcnn.config import Config
from hpcnn.errors import DataError, HpcnnError
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.machine import load as load_machine
from hpcnn.report.traced import LARGEST_BYTES, Trace, read_trace
from hpcnn.report.untrusted import clean, cleaned, is_number
from hpcnn.train import metrics
from hpcnn.train.metrics import Record, Summary, summarise

T = TypeVar("T")

NUMBERS = (
    "loss", "accuracy", "lr", "images_per_second", "step_s", "compute_s", "exposed_comm_s", "hidden_comm_s",
    "input_wait_s", "bytes_sent", "messages_sent", "epoch", "test_loss", "test_accuracy", "peak_memory_bytes",
    "peak_device_memory_bytes",
)  # fmt: skip
"""Fields of records that a report reads; what is no finite number is left out."""


@dataclass(kw_only=True)
class Run:
    """What one run folder holds.

    Attributes
    ----------
    name : str
        What the page calls it.
    config, plan_text, trace : optional
        None where the file is missing or cannot be used; `notes` says why.
    steps, epochs : list of dict
        Records of metrics.jsonl, with the fields in `NUMBERS` that are finite numbers.
    end : dict or None
        The last record of a run that has ended.
    environment : dict
        What environment.json says; empty without one.
    machine : Machine
        What times are predicted with, an ordinary CPU cluster by default.
    notes : list of str
        What a reader should know of the files.
    """

    name: str
    folder: Path
    config: Config | None = None
    plan_text: str | None = None
    steps: list[Record] = field(default_factory=list)
    epochs: list[Record] = field(default_factory=list)
    end: Record | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = None
    machine: Machine = DEFAULT
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> Summary | None:
        """The second half of the steps in a few numbers, as `hpcnn train` prints them."""
        return summarise(self.steps)

    @property
    def num_ranks(self) -> int | None:
        """Ranks that the run had, as far as its files tell."""
        found = re.search(r"^ranks\s*=\s*(\d{1,7})\s*$", self.plan_text or "", re.MULTILINE)
        return int(found[1]) if found else None

    def fact(self, *path: str) -> Any:
        """Return an entry of the environment, None where there is none."""
        value: Any = self.environment
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_run(folder: Path, name: str | None = None) -> Run:
    """Return what a run folder holds.

    Raises
    ------
    DataError
        If there is no such folder, or `hpcnn train` has not written it.
    """
    if not folder.is_dir():
        raise DataError(
            f"report: '{folder}' is not a folder. Name the folder of a run, such as --out of `hpcnn train` was."
        )
    if not (folder / metrics.FILE).is_file():
        raise DataError(
            f"report: '{folder}' holds no {metrics.FILE} and no scaling.csv; a report is made of one of them."
            " Name a folder that `hpcnn train` or `hpcnn scale` has written."
        )
    run = Run(name=clean(name or folder.resolve().name), folder=folder)
    _read_metrics(run)
    text = _text(run, "config.toml", "the configuration")
    if text is not None:
        run.config = _noted(run, "config.toml", lambda: configuration.from_toml(text, "config.toml"))
    run.plan_text = _text(run, "plan.toml", "the plan")
    _read_environment(run)
    machine_file = run.config.exchange.machine if run.config is not None else ""
    if machine_file:
        run.machine = _noted(run, "exchange.machine", lambda: load_machine(machine_file)) or DEFAULT
    _read_trace(run)
    return run


def _read_metrics(run: Run) -> None:
    path = run.folder / metrics.FILE
    records = metrics.read(path)
    with bounded.opened(path) as file:
        num_broken = sum(bool(line.strip()) for line in file) - len(records)
    if num_broken > 0:
        run.notes.append(
            f"{metrics.FILE}: {num_broken} {_plural(num_broken, 'line')} cannot be read and"
            f" {'is' if num_broken == 1 else 'are'} left out; the last line of a run that goes on or was killed may be"
            " half written."
        )
    for record in records:
        kept = {"step": min(max(record["step"], 0), 10**12)}
        kept |= {name: float(record[name]) for name in NUMBERS if is_number(record.get(name))}
        kept["stopped"] = clean(record.get("stopped") or "")
        kept["event"] = record["event"]
        if record["event"] == "step":
            run.steps.append(kept)
        elif record["event"] == "epoch":
            run.epochs.append(kept)
        elif record["event"] == "end":
            run.end = kept
    if not run.steps:
        run.notes.append("The run has made no step yet: there is nothing to draw.")
    elif run.end is None:
        run.notes.append(
            f"The run has not ended: it goes on, or was killed after step {run.steps[-1]['step']}. All numbers are of"
            " what it has written so far."
        )


def _read_environment(run: Run) -> None:
    text = _text(run, "environment.json", "the hosts and versions")
    if text is None:
        return
    try:
        found = bounded.json_value(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        run.environment = cleaned(found)
    else:
        run.notes.append("environment.json cannot be read: hosts and versions are not shown.")


def _read_trace(run: Run) -> None:
    path = run.folder / "trace.json"
    if not path.is_file():
        return
    if path.stat().st_size > LARGEST_BYTES:
        run.notes.append(
            "trace.json is too large to be drawn here; open it at https://ui.perfetto.dev, or trace fewer steps."
        )
        return
    run.trace = _noted(run, "trace.json", lambda: read_trace(path))


def _text(run: Run, name: str, what: str) -> str | None:
    try:
        return bounded.text(run.folder / name, errors="replace")
    except FileNotFoundError:
        run.notes.append(f"There is no {name}: {what} of this run cannot be shown.")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}): {what} of this run cannot be shown.")
    return None


def _noted(run: Run, name: str, read: Callable[[], T]) -> T | None:
    """Return what `read` makes of a file, or None and a note."""
    try:
        return read()
    except HpcnnError as error:
        run.notes.append(clean(f"{name} cannot be used: {error}"))
    except (RecursionError, OverflowError, MemoryError) as error:
        run.notes.append(f"{name} cannot be used: {type(error).__name__}.")
    return None


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"
