"""Timed training on virtual hosts: hpcnn and PyTorch's DDP, and tables of their steps."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from virtual.cluster import Cluster
from virtual.shape import ClusterError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("ddp_worker.py")
IMAGE_SIZE, NUM_CLASSES = 227, 1000
# The first steps fill caches and memory pools, and no exchange of an earlier step is under way.
SETTLING_STEPS = 2

ALEXNET = {"data.image_shape": f"[{IMAGE_SIZE}, {IMAGE_SIZE}, 3]", "data.num_classes": str(NUM_CLASSES)}

Step = Mapping[str, float]


def train_hpcnn(
    cluster: Cluster,
    preset: str,
    settings: Mapping[str, str],
    *,
    steps: int,
    global_batch: int,
    ppn: int = 1,
    limit_s: float,
) -> list[Step]:
    """Run `hpcnn train` on all hosts, one rank or more on each, and return the records of its settled steps.

    Parameters
    ----------
    cluster : Cluster
        The hosts.
    preset : str
        The model and its recipe.
    settings : mapping
        Of the configuration, `{"exchange.kind": "sharded"}` for instance.
    steps, global_batch, ppn : int
        Steps to make, samples in each over all ranks, ranks on each host.
    limit_s : float
        Seconds after which the run is given up.

    Raises
    ------
    ClusterError
        With the end of what the run said, if it fails.
    """
    common = {
        "data.source": "synthetic",
        "data.num_samples": str(global_batch * steps),
        "data.flip": "false",
        "train.global_batch": str(global_batch),
        "train.steps": str(steps),
        "checkpoint.every_epochs": "0",
        "checkpoint.final": "false",
        "log.evaluate_every_epochs": "0",
    }
    sets = [word for key, value in (common | dict(settings)).items() for word in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        words = ["train", preset, *sets, "--out", f"{folder}/run"]
        run_hpcnn(cluster, words, ppn=ppn, limit_s=limit_s)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["event"] == "step"][SETTLING_STEPS:]


def run_hpcnn(cluster: Cluster, words: Sequence[str], *, ppn: int = 1, limit_s: float) -> None:
    """Run an hpcnn command on all hosts; raises ClusterError with the end of what it wrote if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        options = {"stdout": log, "stderr": log, "stdin": -3, "cwd": ROOT, "limit_s": limit_s}
        command = [sys.executable, "-m", "hpcnn", *words]
        status = cluster.mpirun(command, ppn=ppn, env={"PYTHONPATH": str(ROOT)}, **options)
        check(status, f"hpcnn {words[0]}", log)


def train_ddp(cluster: Cluster, *, steps: int, global_batch: int, limit_s: float) -> list[Step]:
    """Return the records of the settled steps of PyTorch's DDP on all hosts; see `train_hpcnn`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        sizes = ["--global-batch", str(global_batch), "--image-size", str(IMAGE_SIZE), "--steps", str(steps)]
        command = [sys.executable, str(WORKER), *sizes, "--out", f"{folder}/record.json"]
        with open(f"{folder}/log", "w+") as log:
            options = {"stdout": log, "stderr": log, "stdin": -3, "limit_s": limit_s}
            check(cluster.each(command, **options), "PyTorch's DDP", log)
        record = json.loads((Path(folder) / "record.json").read_text())
    expected = num_parameters()
    if record["parameters"] != expected:
        raise ClusterError(f"PyTorch's network has {record['parameters']} parameters, hpcnn's {expected}.")
    return record["steps"][SETTLING_STEPS:]


def num_parameters() -> int:
    """Return how many parameters hpcnn's AlexNet has."""
    from hpcnn.nn import models

    return models.build("alexnet", (IMAGE_SIZE, IMAGE_SIZE, 3), NUM_CLASSES).num_parameters


def settings_of(text: str, section: str = "exchange") -> dict[str, str]:
    """Return keys and values of the configuration from words like "kind=sharded,overlap=false,plan.preset=hybrid".

    A key without a section is one of `section`.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and value for key, _, value in pairs):
        example = "preset=spatial" if section == "plan" else "kind=sharded,overlap=false"
        raise ClusterError(f"{section} (={text!r}) must be settings like '{example}'.")
    return {key if "." in key else f"{section}.{key}": value for key, _, value in pairs}


def check(status: int, what: str, log: Any) -> None:
    """Raise ClusterError with the end of the log unless the status is 0."""
    if status:
        log.seek(0)
        said = " | ".join(line.strip() for line in log.read().splitlines()[-6:])
        raise ClusterError(f"{what} failed with status {status}: {said}")


def summary(steps: Sequence[Step]) -> dict[str, float]:
    """Return the median of every number of the steps, and the fastest step."""
    numbers = [key for key, value in steps[0].items() if isinstance(value, int | float)]
    medians = {key: statistics.median(step[key] for step in steps) for key in numbers}
    return medians | {"fastest_s": min(step["step_s"] for step in steps), "num_steps": len(steps)}


def machine() -> str:
    """Return the processor's name and the number of cores."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{match[1] if match else 'unknown processor'}, {os.cpu_count()} cores"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head, and numbers stand at the right."""
    head, *body = rows
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *body))


def write_section(document: Path, name: str, text: str) -> None:
    """Put `text` between the markers of a section of a document.

    Raises
    ------
    ClusterError
        If the document has no such section.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    whole = document.read_text()
    if begin not in whole or end not in whole:
        raise ClusterError(f"{document} has no section '{name}': it must have the lines '{begin.strip()}' and '{end}'.")
    before, rest = whole.split(begin, 1)
    document.write_text(before + begin + text.strip() + "\n" + end + rest.split(end, 1)[1])


def finish(name: str, work: Callable[[], str], document: Path | None, section: str) -> int:
    """Print what `work` reports, write it into a section of a document, and return the exit status of script `name`.

    What cannot be measured is one line; TERM ends the script as an exception does, so that hosts are taken down.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        text = work()
        print(f"\n{text}")
        if document:
            write_section(document, section, text)
    except ClusterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def study(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Any],
    report: Callable[[argparse.Namespace, Any], str],
    section: str,
) -> int:
    """Measure, keep what was found in the file `args.json` if one is named, report, and finish (see `finish`)."""

    def work() -> str:
        found = measure(args)
        text = report(args, found)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        return text

    return finish(name, work, args.document, section)
