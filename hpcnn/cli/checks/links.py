"""Whether sums over ranks were right in the self-test, and messages about as fast as links usually are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts
from hpcnn.cli.table import quantity

FAR_MEASURED, FAR_BUILT_IN = 4.0, 10.0
"""So many times longer than predicted is worth a word: by a measured machine, and by the built-in one."""

SLOW_PAIR, SLOW_PAIR_S = 4.0, 2e-3
"""A pair is slow that takes so many times what the median of its kind takes, and so many seconds more."""


def judge(outcome: Facts, hosts: Sequence[str], *, crowded: bool) -> list[Problem]:
    """Return what the self-test has found wrong.

    Parameters
    ----------
    outcome : dict
        `analysis.self_test.Outcome` as plain values.
    hosts : sequence of str
        The host of every rank.
    crowded : bool
        Whether ranks wait for cores, so that times say nothing about links.
    """
    found = _wrong(outcome["sums"], hosts)
    if crowded:
        return found
    slow = _far(outcome)
    return found + ([slow] if slow else []) + _slow_pairs(outcome, hosts)


def _wrong(sums: Sequence[Facts], hosts: Sequence[str]) -> list[Problem]:
    wrong = [one for one in sums if one["wrong_ranks"]]
    if not wrong:
        return []
    names = ", ".join(dict.fromkeys(one["algorithm"] for one in wrong))
    ranks = sorted({rank for one in wrong for rank in one["wrong_ranks"]})
    where = f"rank {ranks[0]} on {hosts[ranks[0]]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
    fix = "Load another MPI library or transport (UCX_TLS=tcp,self,sm or FI_PROVIDER=tcp), and report it to the site."
    return [Problem(f"all-reduce gave wrong sums ({names}; {where})", fix)]


def _far(outcome: Facts) -> Problem | None:
    best = fastest(outcome)
    if best is None:
        return None
    times = best["seconds"] / best["predicted_s"]
    measured = outcome["measured"]
    if times <= (FAR_MEASURED if measured else FAR_BUILT_IN):
        return None
    expected = "the machine file tells" if measured else "an ordinary cluster's links give"
    what = f"messages are slow: {speed(best)}, {times:.0f} times as long as {expected}"
    fix = "See which network the library takes: `ucx_info -d` (UCX_NET_DEVICES), `fi_info` (FI_PROVIDER)."
    return advice(what, fix)


def _slow_pairs(outcome: Facts, hosts: Sequence[str]) -> list[Problem]:
    found = []
    for same_node in (True, False):
        pairs = [pair for pair in outcome["pairs"] if pair["same_node"] == same_node]
        if len(pairs) < 3:
            continue
        usual = statistics.median(pair["seconds"] for pair in pairs)
        slowest = max(pairs, key=lambda pair: pair["seconds"])
        if slowest["seconds"] < SLOW_PAIR * usual or slowest["seconds"] - usual < SLOW_PAIR_S:
            continue
        who = " and ".join(f"{rank} ({hosts[rank]})" for rank in slowest["ranks"])
        size, times = quantity(outcome["pair_bytes"], "B"), slowest["seconds"] / usual
        what = (
            f"slow link: {size} between ranks {who} took {slowest['seconds'] * 1e3:.3g} ms, {times:.0f} times the usual"
        )
        fix = (
            f"Run again; if the same pair is named, leave a host out: `#SBATCH --exclude={hosts[slowest['ranks'][1]]}`."
        )
        found.append(advice(what, fix))
    return found


def fastest(outcome: Facts) -> Facts | None:
    """Return the fastest of our sums of the longest array, None where nothing was summed."""
    ours = [one for one in outcome["sums"] if one["predicted_s"] is not None]
    longest = max((one["num_bytes"] for one in ours), default=0)
    return min((one for one in ours if one["num_bytes"] == longest), key=lambda one: one["seconds"], default=None)


def speed(one: Facts) -> str:
    """Return the time of a sum as text, with the bytes of the array a second."""
    size, rate = quantity(one["num_bytes"], "B"), quantity(one["num_bytes"] / one["seconds"], "B/s")
    return f"all-reduce of {size} by {one['algorithm']} in {one['seconds'] * 1e3:.3g} ms, {rate}"


def describe(outcome: Facts) -> Facts:
    """Return the outcome in a few lines."""
    if not outcome.get("sums"):
        return {}
    sums = outcome["sums"]
    sizes = sorted({one["num_bytes"] for one in sums})
    wrong = sum(bool(one["wrong_ranks"]) for one in sums)
    names = ", ".join(dict.fromkeys(one["algorithm"] for one in sums))
    lines = {"sums": f"{names}: {len(sums) - wrong} of {len(sums)} right, {sizes[0]} B to {quantity(sizes[-1], 'B')}"}
    best = fastest(outcome)
    if best is not None:
        basis = "machine file" if outcome["measured"] else "built-in machine"
        lines["speed"] = f"{speed(best)} ({basis}: {best['predicted_s'] * 1e3:.3g} ms)"
    library = [one for one in sums if one["algorithm"] == "mpi" and one["num_bytes"] == sizes[-1]]
    if library:
        lines["library"] = speed(library[0])
    if outcome["pairs"]:
        slowest = max(outcome["pairs"], key=lambda pair: pair["seconds"])
        low, high = slowest["ranks"]
        size = quantity(outcome["pair_bytes"], "B")
        lines["slowest pair"] = f"ranks {low} and {high}, {slowest['seconds'] * 1e3:.3g} ms for {size} each way"
    return lines
