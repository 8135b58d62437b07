"""The ranks that a launcher started: what each of them sees, and a look at their messages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpcnn import __version__
from hpcnn.cli import environment
from hpcnn.cli.checks import binding, launch, limits, links, storage
from hpcnn.cli.checks.problem import Problem, advice, merged
from hpcnn.cli.environment import Facts

if TYPE_CHECKING:
    from hpcnn.comm.world import World

START_S = 60.0
"""How long MPI may take to connect the ranks."""

WATCH_S = 15.0
"""How long a rank may keep the others waiting in the self-test before it is named and the job ended."""

TEST_S = 2.0
BUSY = 1.5
"""Processes that want to run, on each core, before the ranks have done anything."""

SHOWN = ("rank", "host", "local_rank", "cores", "threads", "gpus")
SHARED_MEMORY = Path("/dev/shm")

_WATCHER = """
import os, select, sys
seconds, parent, words = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0] and os.getppid() == parent:
    print(words, file=sys.stderr, flush=True)
    os.kill(parent, 9)
"""


@contextmanager
def starting_within(seconds: float, rank: int) -> Iterator[None]:
    """End this process with one line if a `with` block takes longer.

    MPI is started inside a call that neither lets Python's threads run nor looks at signals, so a small process watches
    from outside. Of ranks that give up together the lowest speaks: the launcher then ends the others.
    """
    words = (
        f"hpcnn: error: doctor: MPI did not connect the ranks within {seconds:.0f} s. See whether all hosts reach each"
        " other and whether the launcher belongs to the MPI library."
    )
    command = [sys.executable, "-S", "-c", _WATCHER, str(seconds + min(rank, 8)), str(os.getpid()), words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watcher:
        try:
            yield
        finally:
            watcher.communicate()  # closes its input, at which it ends


def collect(machine_file: Path | None, rank: int) -> Facts:
    """Start MPI and return what the ranks see and how a few sums went; complete on rank 0 only (collective).

    Raises
    ------
    CommError
        If there is no MPI library, or MPI does not connect what the launcher started.
    PlanError
        If the machine file cannot be read.
    """
    from hpcnn.analysis.self_test import self_test
    from hpcnn.comm import start
    from hpcnn.comm.library import load
    from hpcnn.plan.machine import from_toml

    warnings.filterwarnings("ignore", message="suspicious MPI")  # mpi4py's word for what is reported here
    with starting_within(START_S, rank):
        world = start()
    world.watchdog.timeout_s, world.watchdog.doing = WATCH_S, "the doctor's self-test"
    world.barrier()
    world.engine.watch(world.watchdog)
    text = ""
    with world.agreeing():
        if world.rank == 0 and machine_file is not None:
            text = machine_text(machine_file)
    text = world.broadcast_obj(text)
    everyone = world.gather_obj(_mine(world))
    outcome = self_test(world, seconds=TEST_S, machine=from_toml(text) if text else None)
    mpi = load()
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized"}
    vendor, version = mpi.get_vendor()
    mapped = environment.mapped_libraries()
    library = {
        "vendor": f"{vendor} {'.'.join(map(str, version))}",
        "standard": ".".join(map(str, mpi.Get_version())),
        "thread_level": levels.get(mpi.Query_thread(), "multiple"),
        "cuda_aware": environment.cuda_aware(mapped),
        "mapped": mapped,
    }
    return {"mpi": library, "ranks": everyone or [], "messages": outcome.as_json()}


def machine_text(path: Path) -> str:
    """Return the text of a machine file that has been found right; raises PlanError."""
    from hpcnn.plan.machine import load, to_toml

    return to_toml(load(path))


def _mine(world: World) -> Facts:
    """Return what this rank sees; the first rank of a node also tells of the node."""
    import numpy as np

    from hpcnn.comm.quota import cpu_quotas

    mine: Facts = {
        "rank": world.rank,
        "host": world.hostnames[world.rank],
        "local_rank": world.local_rank,
        "cores": environment.ranges(environment.usable_cores()),
        "threads": world.num_threads,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "node_cores": environment.node_cores(),
        "quotas": cpu_quotas(),
        "time_s": time.time(),
        "versions": {"hpcnn": __version__, "Python": platform.python_version(), "NumPy": np.__version__},
    }
    if world.local_rank == 0:
        folders = {"shared memory": SHARED_MEMORY} if SHARED_MEMORY.exists() else {}
        mine["node"] = {
            "local_size": world.local_size,
            "cores": os.cpu_count() or 1,
            "name": limits.hostname(),
            "limits": limits.facts(),
            "storage": storage.facts(folders),
            "load": os.getloadavg()[0],
            "processor": environment.processor()["model"],
        }
    return mine


def judge(report: Facts, variables: Mapping[str, str], *, trial: bool) -> list[Problem]:
    """Return what is wrong with ranks, nodes and messages; on a trial, cores and threads are nobody's choice.

    Parameters
    ----------
    report : dict
        As `collect` returns it on rank 0.
    variables : mapping
        The environment of rank 0.
    trial : bool
        Whether the ranks were started by the doctor itself.
    """
    ranks = report["ranks"]
    hosts = [rank["host"] for rank in ranks]
    found = launch.judge(report["mpi"], len(ranks), {} if trial else variables)
    found += [] if trial else binding.judge(ranks) + binding.judge_slurm(ranks, variables)
    nodes = {rank["host"]: rank["node"] for rank in ranks if "node" in rank}
    for host, node in nodes.items():
        found += limits.judge(host, node["limits"], local_size=node["local_size"], num_ranks=len(ranks))
        shared = node["storage"].get("shared memory")
        found += storage.shared_memory(shared, host) if shared and node["local_size"] > 1 else []
    found += limits.judge_names([node["name"] for node in nodes.values()])
    found += limits.judge_clocks(hosts, [rank["time_s"] for rank in ranks])
    found += unlike(ranks)
    kinds = {node["processor"]: host for host, node in nodes.items()}
    if len(kinds) > 1:
        what = "processors differ: " + ", ".join(f"{host} has {kind}" for kind, host in kinds.items())
        found.append(advice(what, "The slowest sets the pace: ask for nodes of one kind (`#SBATCH --constraint`)."))
    busy = [advice(*words) for words in _busy(nodes)]
    crowded = bool(busy) or any(rank["threads"] > len(environment.numbers(rank["cores"])) for rank in ranks)
    found += busy + links.judge(report["messages"], hosts, crowded=crowded or _more_than_cores(ranks))
    return merged(found, set(hosts))


def _busy(nodes: Mapping[str, Facts]) -> Iterator[tuple[str, str]]:
    """Yield the nodes on which others compute."""
    for host, node in nodes.items():
        if node["load"] > BUSY * node["cores"]:
            what = f"{host}: the load is {node['load']:.1f} on {node['cores']} cores: others compute there"
            yield what, "Ask for nodes of your own (`#SBATCH --exclusive`), or see who is left there with `top`."


def unlike(ranks: Sequence[Facts]) -> list[Problem]:
    """Return which versions are not those of rank 0."""
    found = []
    for name, version in ranks[0]["versions"].items():
        others = [rank for rank in ranks if rank["versions"][name] != version]
        if others:
            theirs = others[0]["versions"][name]
            what = f"rank {others[0]['rank']} on {others[0]['host']} has {name} {theirs}, rank 0 {version}"
            fix = "Activate the same environment on every node, in the job script rather than in a shell's profile."
            found.append(Problem(what, fix, essential=name == "hpcnn"))
    return found


def _more_than_cores(ranks: Sequence[Facts]) -> bool:
    """Return whether on some host there are more ranks than cores for them."""
    for host in {rank["host"] for rank in ranks}:
        here = [environment.numbers(rank["cores"]) for rank in ranks if rank["host"] == host]
        if len(here) > len(set().union(*here)):
            return True
    return False
