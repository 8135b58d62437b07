"""Limits of a node that end jobs: locked memory, open files, memory of the control group, names."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence
from pathlib import Path

from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts
from hpcnn.cli.table import quantity
from hpcnn.comm.quota import memory_limit

KINDS = {
    "locked_memory_bytes": resource.RLIMIT_MEMLOCK,
    "open_files": resource.RLIMIT_NOFILE,
    "address_space_bytes": resource.RLIMIT_AS,
}
LEAST_LOCKED_BYTES = 1 << 30
"""What a few ranks register with an InfiniBand adapter."""

FILES_BESIDE_RANKS = 256
LEAST_MEMORY_BYTES = 1 << 30
MOST_SKEW_S = 2.0


def facts(root: Path = Path("/")) -> Facts:
    """Return the limits of this process and the memory that is left to it; None where there is no limit."""
    values = {name: resource.getrlimit(kind)[0] for name, kind in KINDS.items()}
    found: Facts = {name: None if value == resource.RLIM_INFINITY else value for name, value in values.items()}
    adapters = root / "sys/class/infiniband"
    found["infiniband"] = sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else []
    limit, used = memory_limit(root)
    found |= {"memory_limit_bytes": limit, "memory_used_bytes": used, "memory_available_bytes": _available(root)}
    return found


def hostname() -> Facts:
    """Return this host's name and the address that it stands for, None where it stands for none."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = None
    return {"name": name, "address": address}


def _available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def left_bytes(limits: Facts) -> int | None:
    """Return the memory that is left to the processes of this node, None if that is not known."""
    left = [limits.get("memory_available_bytes")]
    if limits.get("memory_limit_bytes") is not None:
        left.append(limits["memory_limit_bytes"] - limits["memory_used_bytes"])
    return min((value for value in left if value is not None), default=None)


def judge(host: str, limits: Facts, *, local_size: int = 1, num_ranks: int = 1) -> list[Problem]:
    """Return which limits of a host are too low for its ranks and those of the whole job."""
    found = []
    locked = limits.get("locked_memory_bytes")
    if limits.get("infiniband") and locked is not None and locked < LEAST_LOCKED_BYTES:
        what = f"{host}: {quantity(locked, 'B')} of memory may be locked (ulimit -l), too little for InfiniBand"
        found.append(
            advice(
                what, "Raise it: `ulimit -l unlimited` in the job, or ask the site (Slurm: PropagateResourceLimits)."
            )
        )
    files, needed = limits.get("open_files"), 2 * num_ranks + FILES_BESIDE_RANKS
    if files is not None and files < needed:
        what = f"{host}: {files} open files are allowed (ulimit -n), {num_ranks} ranks may need {needed}"
        found.append(advice(what, f"`ulimit -n {needed}` in the job script, or ask the site to raise the hard limit."))
    space = limits.get("address_space_bytes")
    if space is not None:
        what = f"{host}: a process may map {quantity(space, 'B')} (ulimit -v); MPI and CUDA map more than they use"
        found.append(advice(what, "`ulimit -v unlimited` in the job script."))
    left = left_bytes(limits)
    if left is not None and left < LEAST_MEMORY_BYTES * local_size:
        of = " of the control group" if limits.get("memory_limit_bytes") is not None else ""
        what = f"{host}: {quantity(left, 'B')} of memory{of} left for {local_size} rank{'s' * (local_size > 1)}"
        found.append(advice(what, "Ask for more (#SBATCH --mem or --mem-per-cpu), or start fewer ranks a node."))
    return found


def judge_names(names: Sequence[Facts]) -> list[Problem]:
    """Return which of several hosts cannot be found by their names."""
    found = []
    lost = sorted({one["name"] for one in names if one["address"] is None})
    if lost:
        what = f"host names without an address: {', '.join(lost)}"
        found.append(advice(what, "Add them to /etc/hosts or DNS: libraries that use TCP find each other by name."))
    local = sorted({one["name"] for one in names if (one["address"] or "").startswith("127.")})
    if len({one["name"] for one in names}) > 1 and local:
        what = f"these hosts take their own names for the loopback address: {', '.join(local)}"
        found.append(advice(what, "Give /etc/hosts the address of the network, or name the interface (MPICH: -iface)."))
    return found


def judge_clocks(hosts: Sequence[str], seconds: Sequence[float]) -> list[Problem]:
    """Return whether hosts disagree on the time of day, told by all ranks at about the same moment."""
    if max(seconds) - min(seconds) <= MOST_SKEW_S:
        return []
    early, late = (hosts[seconds.index(end(seconds))] for end in (min, max))
    what = f"clocks are {max(seconds) - min(seconds):.1f} s apart: {early} is behind {late}"
    return [
        advice(what, "Have the site synchronise them (chrony, ntpd): newest checkpoints and logs go by these times.")
    ]
