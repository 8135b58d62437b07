"""Whether every rank has cores of its own, and no more threads than cores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts, numbers, ranges

UNBIND = "Do not bind (mpirun --bind-to none, mpiexec -bind-to none), or bind each rank to cores of its own"


def judge(ranks: Sequence[Facts]) -> list[Problem]:
    """Return what is wrong with cores and threads, host by host.

    Parameters
    ----------
    ranks : sequence of dict
        Of each rank `rank`, `host`, `cores` ("0-3,8": its affinity mask) and `threads`; `quotas` (cores by control
        group) and `node_cores` may be missing.
    """
    found = []
    for host in dict.fromkeys(rank["host"] for rank in ranks):
        here = [rank for rank in ranks if rank["host"] == host]
        crowd = _crowd(host, here)
        found += [crowd] if crowd else []
        found += _quotas(host, here)
        idle = None if crowd else _idle(host, here)
        found += [idle] if idle else []
    return found


def judge_slurm(ranks: Sequence[Facts], environment: Mapping[str, str]) -> list[Problem]:
    """Return whether ranks have fewer cores than Slurm was asked for: not every srun inherits that number."""
    asked = environment.get("SLURM_CPUS_PER_TASK", "")
    fewest = min(ranks, key=lambda rank: len(numbers(rank["cores"])))
    cores = len(numbers(fewest["cores"]))
    if "SLURM_STEP_ID" not in environment or not asked.isdecimal() or cores >= int(asked):
        return []
    what = f"rank {fewest['rank']} on {fewest['host']} has {cores} cores, --cpus-per-task asks for {asked}"
    return [advice(what, 'Say it to srun, too: `srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores`.')]


def _crowd(host: str, here: Sequence[Facts]) -> Problem | None:
    """Return the smallest set of cores on which ranks run more threads than it has, if there is one."""
    masks = [frozenset(numbers(rank["cores"])) for rank in here]
    union = frozenset().union(*masks)
    for mask in sorted({*masks, union}, key=lambda mask: (len(mask), sorted(mask))):
        inside = [rank for rank, cores in zip(here, masks, strict=True) if cores <= mask]
        threads = sum(rank["threads"] for rank in inside)
        if threads <= len(mask):
            continue
        if mask == union and len(inside) > 1:
            most = len(mask) // len(inside)
            what = f"{host}: {len(inside)} ranks with {threads} threads together on {len(mask)} cores"
            return advice(what, f"Set OMP_NUM_THREADS={most}." if most else f"Start at most {len(mask)} ranks there.")
        who = ", ".join(str(rank["rank"]) for rank in inside)
        cores = f"core{'s' if len(mask) > 1 else ''} {ranges(sorted(mask))}"
        if len(inside) == 1:
            what = f"{host}: rank {who} is bound to {cores} and runs {threads} threads"
            fix = (
                f"Set OMP_NUM_THREADS={len(mask)}, or give each rank {threads} cores: `srun --cpus-per-task={threads}`"
            )
            return advice(what, f"{fix}, `mpirun --map-by slot:PE={threads}`.")
        what = f"{host}: ranks {who} share {cores}, {threads} threads together, while others are free"
        return advice(what, f"{UNBIND} (srun --cpu-bind=cores, mpirun --bind-to core --map-by slot:PE=N).")
    return None


def _quotas(host: str, here: Sequence[Facts]) -> list[Problem]:
    """Return the quotas of control groups under which ranks run more threads than they get cores' time for."""
    limits: dict[str, float] = {}
    for rank in here:
        limits |= rank.get("quotas", {})
    for group, cores in sorted(limits.items(), key=lambda pair: pair[1]):
        inside = [rank for rank in here if group in rank.get("quotas", {})]
        threads = sum(rank["threads"] for rank in inside)
        if threads > math.ceil(cores):
            what = f"{host}: a control group grants {cores:g} cores' time to {len(inside)} ranks with {threads} threads"
            fix = f"Set OMP_NUM_THREADS={max(1, math.ceil(cores) // len(inside))}, or ask for {threads} CPUs."
            return [advice(what, fix)]
    return []


def _idle(host: str, here: Sequence[Facts]) -> Problem | None:
    """Return whether the ranks are bound to half of the node's cores or less."""
    used = len(frozenset().union(*(numbers(rank["cores"]) for rank in here)))
    cores = min(rank.get("node_cores", used) for rank in here)
    if 2 * used > cores:
        return None
    what = f"{host}: the ranks may run on {used} of {cores} cores"
    return advice(what, f"{UNBIND} (mpirun --map-by slot:PE={cores // len(here)}, srun --cpus-per-task).")
