"""The record of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard events beside it on request.

Every line has `event` and `step`, the number of updates made so far. Events: "step" (epoch loss accuracy lr
images_per_second step_s compute_s exposed_comm_s hidden_comm_s input_wait_s bytes_sent messages_sent), "average" (of
replicas: see `train/rules/rule.py`), "epoch" (with test results), "rollback" to the checkpoint of `step` (with reason
from_step lr_scale) and "end" (a summary, and peak_memory_bytes of the rank that took most; with GPUs also
peak_device_memory_bytes, of the arrays of the rank with most of them). compute_s is the step's time less what was
waited for other ranks and images: on a GPU too, where the step waits for the loss. Communication that the
computation waited for is exposed, the rest of the time in which messages were under way is hidden.
A number that is not finite is written as null, so that every line is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hpcnn import bounded, gpu
from hpcnn.arrays import Place
from hpcnn.comm.counters import Communication
from hpcnn.errors import ConfigError, DataError
from hpcnn.train.atomic import replacing
from hpcnn.train.evaluate import Score

FILE = "metrics.jsonl"
LARGEST_BYTES = 1 << 29
"""More than a million steps."""
Event: TypeAlias = Literal["step", "average", "epoch", "rollback", "end"]
Record: TypeAlias = dict[str, Any]


def costs(step_s: float, spent: Communication, wait_s: float) -> Record:
    """Return what a step's record says of its time: what it communicated in the open, waited for images, computed."""
    return {
        "step_s": step_s,
        "compute_s": max(0.0, step_s - spent.exposed_s - wait_s),
        "exposed_comm_s": spent.exposed_s,
        "hidden_comm_s": spent.hidden_s,
        "input_wait_s": wait_s,
        "bytes_sent": spent.traffic.num_bytes,
        "messages_sent": spent.traffic.num_messages,
    }


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl`; on one rank only. A context manager.

    Parameters
    ----------
    run_folder : Path
        The run's folder, which exists.
    resumed_step : int, optional
        Step of the checkpoint that the run goes on from: what was written after it, and old "end" records, are
        dropped, so that no step stands there twice. Left out: a new run, whose file starts empty.
    tensorboard : bool
        Also write TensorBoard events, into `<run>/tensorboard`.
    on_error : callable, optional
        Gets the DataError of a record that cannot be written, which is lost then; left out, it is raised.

    Raises
    ------
    ConfigError
        If TensorBoard is asked for and tensorboardX is not installed, or the file cannot be written.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        resumed_step: int | None = None,
        tensorboard: bool = False,
        on_error: Callable[[DataError], None] | None = None,
    ) -> None:
        self.path = Path(run_folder) / FILE
        self._tensorboard = tensorboard
        self._on_error = on_error
        self._open(resumed_step or 0)

    def rewind(self, step: int) -> None:
        """Drop the records of later steps: the run goes on from `step`; raises ConfigError as at the beginning."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        self._events = _summary_writer(self.path.parent / "tensorboard", step) if self._tensorboard else None
        try:
            if self.path.exists():
                truncate(self.path, step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"metrics: cannot write '{self.path}': {error.strerror}. Make the run folder writable or set --out."
            ) from None

    def write(self, event: Event, step: int, **fields: Any) -> Record:
        """Append one record, hand it to the system, and return it; TensorBoard has its numbers as "<event>/<name>".

        The file has whole lines only: what does not fit on the disk is taken back.
        """
        record: Record = {"event": event, "step": step, **{name: _plain(value) for name, value in fields.items()}}
        try:
            self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        except OSError as error:
            failure = DataError(
                f"metrics: cannot write '{self.path}': {error.strerror}; checkpoints written so far are intact."
                " Free some space and go on with --resume."
            )
            if self._on_error is None:
                raise failure from None
            self._on_error(failure)
            return record
        if self._events is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(f"{event}/{name}", value, step)
        return record

    def finish(
        self, step: int, peaks: Iterable[Mapping[str, int]], score: Score | None, **fields: Any
    ) -> Summary | None:
        """Write the last record, close the file, and return the summary of the run.

        Parameters
        ----------
        step : int
            Steps made.
        peaks : iterable of mappings
            `peak_memory` of every rank; the largest are written.
        score : Score, optional
            Of the last evaluation.
        **fields
            What else to write.
        """
        summary = summarise(read(self.path))
        fields |= {} if summary is None else dataclasses.asdict(summary)
        for peak in peaks:
            fields |= {name: max(value, fields.get(name, 0)) for name, value in peak.items()}
        if score is not None:
            fields |= {"test_accuracy": score.accuracy, "test_loss": score.loss}
        self.write("end", step, **fields)
        self.close()
        return summary

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def peak_memory_bytes() -> int:
    """Return the largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(device: Place) -> dict[str, int]:
    """Return `peak_memory_bytes` and, on a GPU, `peak_device_memory_bytes` of this process, by these names."""
    peaks = {"peak_memory_bytes": peak_memory_bytes()}
    return peaks | {"peak_device_memory_bytes": gpu.peak_memory_bytes()} if device == "cuda" else peaks


def truncate(path: Path, step: int) -> None:
    """Keep the records of a metrics file up to `step`, without "end" records and broken lines; in one rename."""
    kept = [record for record in _records(path) if record["event"] != "end" and record["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read(path: Path) -> list[Record]:
    """Return the records of a metrics file; a last line that a killed run left half written is skipped.

    Raises
    ------
    DataError
        If the file is missing or cannot be read.
    """
    try:
        return _records(Path(path))
    except OSError as error:
        raise DataError(
            f"metrics: cannot read '{path}': {error.strerror}. Name a run folder that 'hpcnn train' has written."
        ) from None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run's steps amount to, over their second half: the first has the warm-up of caches and links."""

    num_steps: int
    """Steps that this is taken from."""
    images_per_second: float
    step_s: float
    """Mean seconds of a step."""
    compute_share: float
    """Part of the step time in arithmetic; the shares add up to 1."""
    exposed_comm_share: float
    """Part spent waiting for other ranks."""
    input_wait_share: float
    """Part spent waiting for images."""
    other_share: float
    """The rest."""
    hidden_comm_share: float | None
    """Part of all communication time that ran behind the computation; None where there was no communication."""
    bytes_per_step: float
    """Mean bytes that the writing rank sent in a step."""
    messages_per_step: float


def summarise(records: Iterable[Record]) -> Summary | None:
    """Return the summary of a run from its records, or None when it has made no step."""
    steps = [record for record in records if record["event"] == "step" and record.get("step_s")]
    steps = steps[len(steps) // 2 :]
    if not steps:
        return None

    def total(name: str) -> float:
        return math.fsum(record.get(name) or 0.0 for record in steps)

    seconds = total("step_s")
    images = math.fsum((record.get("images_per_second") or 0.0) * record["step_s"] for record in steps)
    exposed_s, hidden_s = total("exposed_comm_s"), total("hidden_comm_s")
    compute, exposed, waiting = total("compute_s") / seconds, exposed_s / seconds, total("input_wait_s") / seconds
    return Summary(
        num_steps=len(steps),
        images_per_second=images / seconds,
        step_s=seconds / len(steps),
        compute_share=compute,
        exposed_comm_share=exposed,
        input_wait_share=waiting,
        other_share=max(0.0, 1.0 - compute - exposed - waiting),
        hidden_comm_share=hidden_s / (hidden_s + exposed_s) if hidden_s + exposed_s > 0.0 else None,
        bytes_per_step=total("bytes_sent") / len(steps),
        messages_per_step=total("messages_sent") / len(steps),
    )


def _records(path: Path) -> list[Record]:
    """Return the whole lines of a metrics file that are records."""
    records = []
    for line in bounded.text(path, LARGEST_BYTES, "replace").splitlines():
        try:
            record = bounded.json_value(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _plain(value: Any) -> Any:
    """Return a NumPy scalar as a Python number, and what is not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # an extra, and slow to import
    except ImportError:
        raise ConfigError(
            "config: 'log.tensorboard' (=True) needs tensorboardX, which is not installed."
            " Run: pip install 'hpcnn[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
