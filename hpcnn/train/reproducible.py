"""What the bits of a reproducible run depend on besides its configuration: threads, libraries and the processor.

Kernels cut their work by the number of threads and pick instructions by the processor, and both change the order of
sums inside a virtual shard. So all ranks must be alike, and a checkpoint remembers what it was computed with.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hpcnn.blas import CORE_TYPE
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.errors import CheckpointError, PlanError
from hpcnn.ops import backend
from hpcnn.train import checkpoint
from hpcnn.train.checkpoint import Latest

THREADS = 1
"""Threads of a rank unless OMP_NUM_THREADS says otherwise: a share of the cores would depend on the ranks."""

SHARDS = "virtual shards"
NUM_THREADS = "threads of a rank"


def prepare(config: Config, world: World) -> str:
    """Fix the number of threads and return what this job computes with, which is the same on all ranks (collective).

    Returns
    -------
    str
        Lines of "thing: what"; empty unless `train.reproducible`.

    Raises
    ------
    PlanError
        On every rank, if ranks differ, or there are more of them than virtual shards.
    """
    if not config.train.reproducible:
        return ""
    shards = config.train.virtual_shards
    if world.size > shards:
        raise PlanError(
            f"plan: {world.size} ranks share train.virtual_shards (={shards}) virtual shards; each needs at least one."
            " Use fewer ranks, or start a run with more shards, which has other bits."
        )
    world.limit_threads(THREADS)
    mine = arithmetic(shards, world.num_threads)
    first = world.broadcast_obj(mine)
    error = None
    if mine != first:
        differ = "; ".join(f"{name} {here} instead of {there}" for name, here, there in _differences(mine, first))
        error = PlanError(
            f"plan: this rank computes with {differ} on rank 0; train.reproducible needs all ranks alike. Use nodes"
            " of one type, one installation and one OMP_NUM_THREADS."
        )
    world.agree(error)
    return mine


def arithmetic(num_shards: int, num_threads: int) -> str:
    """Return what a rank computes with, in lines of "thing: what"."""
    facts = {
        SHARDS: num_shards,
        NUM_THREADS: num_threads,
        "processor": processor(),
        "operators": backend.name().partition(" (")[0],
        "NumPy": np.__version__ + (f" with {CORE_TYPE}={os.environ[CORE_TYPE]}" if CORE_TYPE in os.environ else ""),
    }
    return "\n".join(f"{name}: {what}" for name, what in facts.items())


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, "unknown" where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def compare(before: str, now: str, origin: str) -> str:
    """Return a warning, or "", about going on with a checkpoint that was computed with `before`.

    Raises
    ------
    CheckpointError
        If the numbers of shards or threads differ: the run would go on with other bits than it would have had.
    """
    if not now or before == now:
        return ""
    if not before:
        return f"{origin} is of a run without train.reproducible: bits are the same from here on only."
    differences = _differences(before, now)
    words = "; ".join(f"{name} {there} then, {here} now" for name, there, here in differences)
    if any(name in (SHARDS, NUM_THREADS) for name, _, _ in differences):
        raise CheckpointError(
            f"checkpoint: {origin} was computed otherwise ({words}), and the bits of a reproducible run depend on it."
            " Set train.virtual_shards and OMP_NUM_THREADS as they were, or go on with train.reproducible = false."
        )
    return f"{origin} was computed otherwise ({words}): bits may differ from here on."


def to_resume(run_folder: str | Path, data_fingerprint: str, arithmetic: str) -> Latest | None:
    """Return what `checkpoint.to_resume` does, with a warning where a run goes on with another arithmetic.

    Raises
    ------
    CheckpointError
        As there, and as `compare` does.
    """
    found = checkpoint.to_resume(run_folder, data_fingerprint)
    if found is None:
        return None
    warning = compare(found.checkpoint.arithmetic, arithmetic, f"'{found.checkpoint.path}'")
    return found._replace(warning=" ".join(filter(None, (found.warning, warning))))


def _differences(first: str, second: str) -> list[tuple[str, str, str]]:
    """Return the things that differ, with what they are in both."""
    there, here = (dict(line.split(": ", 1) for line in text.splitlines()) for text in (first, second))
    return [(name, there.get(name, "?"), here[name]) for name in here if there.get(name) != here[name]]
