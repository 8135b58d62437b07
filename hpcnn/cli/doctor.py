"""`hpcnn doctor`: what is installed and started here, whether ranks reach each other, and how to mend what is broken.

Without a launcher it starts two ranks of itself, so that a launcher and a library that do not belong together are
found. Under mpirun or srun it looks at the ranks it was started with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcnn.cli import environment, gpus
from hpcnn.cli.checks import installation, launch, limits, links, ranks, storage
from hpcnn.cli.checks.problem import Problem
from hpcnn.cli.environment import Facts
from hpcnn.cli.main import launched, launched_rank
from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import ConfigError, HpcnnError, PlanError

REINSTALL = "Reinstall with `pip install --force-reinstall hpcnn`, in a fresh virtual environment."
DEFAULT_OUT = Path("runs")
MOST_RANKS = 32
"""Ranks that the text lists; the JSON has all."""

MANUAL = Manual(
    """Reports what is installed and started here, and says of everything that is broken or slow how to mend it, in
    one line each. Started alone it starts two ranks of itself to see whether launcher and MPI library belong together;
    under mpirun or srun it looks at the ranks of that job: their cores and threads, their nodes' limits, and for about
    two seconds their messages. Rank 0 prints.""",
    examples=(
        ("hpcnn doctor", "after an installation, or on a login node"),
        ("mpiexec -n 8 hpcnn doctor", "the ranks of this very launch line"),
        ("srun hpcnn doctor --strict || exit 1", "in a job script: go on only if nothing is amiss"),
        ("hpcnn doctor --json report.json --out runs/a", "keep the facts; check the folder that a run will write to"),
        ("hpcnn doctor --compile --arch 80,90a", "fill the cache of kernels before a job needs it"),
    ),
    files=(("FILE", "with --json: every fact, and the problems as {what, fix, essential}"),),
    exit_codes=(
        (0, "training can work; there may be advice"),
        (1, "training cannot work, or with --strict there is advice; with --compile: a kernel did not compile"),
        (2, "wrong usage"),
    ),
    see_also=("hpcnn profile", "hpcnn bench allreduce"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("doctor", help="check this installation and say how to mend it")
    explain(parser, MANUAL)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report to this file as JSON; without a name print it instead of the text",
    )
    report.add_argument("--strict", action="store_true", help="exit with 1 for advice, too")
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--mpi", action="store_true", help="start MPI in this process (the default under mpirun and srun)"
    )
    checks.add_argument("--out", type=Path, metavar="FOLDER", help=f"run folder to check (default: {DEFAULT_OUT})")
    checks.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="compare messages with this file of `hpcnn profile` (default: none)",
    )
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("--compile", action="store_true", help="only compile all GPU kernels, so that runs find them")
    kernels.add_argument("--arch", metavar="80,90", help="architectures to compile for (default: this host's GPUs)")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 when something essential is broken (collective with MPI)."""
    if args.compile or args.arch:
        return compile_kernels(args.arch, args.json)
    rank = launched_rank()
    problems: list[Problem] = []
    report: Facts = examine(problems, args.out) if rank == 0 else {}
    if args.mpi or launched():
        report |= ranks_here(problems, args.machine)
    else:
        report |= ranks_by_trial(problems, args.machine)
    if rank:
        return 0  # rank 0 decides; were others to fail before it has spoken, a launcher could cut it short
    report["problems"] = [problem._asdict() for problem in dict.fromkeys(problems)]
    _write(args.json, report, render(report))
    return int(any(problem.essential or args.strict for problem in problems))


def _write(destination: str | None, report: Any, text: str) -> None:
    """Print the text, and put the report where `--json` says, if only in the place of the text."""
    as_json = json.dumps(report, indent=2)
    print(as_json if destination == "-" else text)
    if destination not in (None, "-"):
        try:
            Path(destination).write_text(as_json + "\n")
        except OSError as error:
            raise ConfigError(f"doctor: cannot write '{destination}': {error}. Name another file.") from None


def compile_kernels(architectures: str | None, destination: str | None) -> int:
    """Compile all GPU kernels and print what became of each; return 1 when one failed.

    Every rank does so: a cache of each node's own is filled by the first that locks it, and the others wait.
    """
    from hpcnn.ops.cuda import compile

    speaks = launched_rank() == 0
    if speaks:
        compile.on_compile = lambda line: print(line, file=sys.stderr)
    lines = gpus.compile_kernels(architectures)
    if speaks:
        _write(destination, lines, gpus.compiled_table(lines))
    return int(any(line["problem"] for line in lines))


def examine(problems: list[Problem], out: Path | None = None) -> Facts:
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
        "limits": limits.facts,
        "storage": lambda: folders(out or DEFAULT_OUT),
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
    problems += judge(report, chosen=out is not None)
    return report


def folders(out: Path) -> Facts:
    """Return what is known of the folders that training writes to."""
    from hpcnn.ops.cuda import cache

    found = storage.facts({"run folder": out, "cache": cache.folders()[0], "shared memory": ranks.SHARED_MEMORY})
    if "error" not in found["run folder"]:
        found["run folder"]["hdf5_error"] = storage.hdf5_error(out.absolute())
    return found


def judge(report: Facts, *, chosen: bool = False) -> list[Problem]:
    """Return what the facts of this process say is missing or slow."""
    found = installation.judge(report)
    with_gpu = bool(report.get("gpu", {}).get("found"))
    found += storage.judge(report.get("storage", {}), chosen=chosen, with_gpu=with_gpu, environment=os.environ)
    return found + limits.judge(report.get("program", {}).get("host", "here"), report.get("limits", {}))


def ranks_here(problems: list[Problem], machine_file: Path | None = None) -> Facts:
    """Start MPI in this process and return the library, all ranks and how their messages fared (collective)."""
    nothing: Facts = {"mpi": {}, "ranks": [], "messages": {}}
    starter = launch.starter(os.environ)
    clash = launch.clash(starter, environment.mpi_library()) if starter and starter != "srun" else None
    if clash:  # starting MPI could end this process
        problems.append(clash)
        return nothing
    try:
        found = ranks.collect(machine_file, launched_rank())
    except (ConfigError, PlanError):  # of the machine file: what was typed, not what is here
        raise
    except HpcnnError as error:
        problems.append(_of_start(error))
        return nothing
    except ImportError as error:
        problems.append(Problem(str(error), installation.NO_MPI))
        return nothing
    if found["ranks"]:  # rank 0
        problems += ranks.judge(found, os.environ, trial=not launched())
    return found


def _of_start(error: HpcnnError) -> Problem:
    """Return why MPI did not start; where it connects nobody, what starts the ranks of this library."""
    problem = Problem.of(error)
    if "connects only 1" not in problem.what:
        return problem
    starter, library = launch.starter(os.environ), environment.mpi_library()
    if starter in (None, "srun"):
        return problem._replace(fix=launch.srun_fix(library))
    return launch.strangers(starter or "", library.splitlines()[0])


def ranks_by_trial(problems: list[Problem], machine_file: Path | None = None) -> Facts:
    """Start two ranks with the launcher on PATH, or one without it, and return what they report."""
    if machine_file is not None:
        ranks.machine_text(machine_file)  # a wrong path is worth knowing before ranks are started
    mpiexec = shutil.which("mpiexec") or shutil.which("mpirun")
    version = (environment.launcher().get("mpiexec") or "") if mpiexec else ""
    clash = launch.clash(version, environment.mpi_library())
    trials = [(2, [mpiexec, "-n", "2"])] if mpiexec else []
    options = ["--machine", str(machine_file)] if machine_file else []
    for size, command in [*trials, (1, [])]:
        label = " ".join(command) or "a single rank"
        found, failure = environment.trial_launch(command, options)
        if found is None and command and clash:
            problems.append(clash)
        elif found is None:
            fix = f"Use the launcher that belongs to the MPI library. {installation.NO_MPI}"
            problems.append(Problem(f"{label}: {failure}", fix))
        elif failure:  # several reports, each of a single rank
            problems.append(launch.strangers(version, found["mpi"].get("vendor", "")))
            return _started(label, found)
        elif len(found["ranks"]) == size:
            problems += ranks.judge(found, os.environ, trial=True)
            return _started(label, found)
        else:
            problems += [Problem(**entry) for entry in found["problems"]]
    return {"mpi": {}, "ranks": [], "messages": {}}


def _started(label: str, found: Facts) -> Facts:
    return {"trial": {"started": label}} | {name: found[name] for name in ("mpi", "ranks", "messages")}


def render(report: Facts) -> str:
    """Return the report as text."""
    lines = []
    sections = dict(report) | {"messages": links.describe(report.get("messages", {}))}
    sections |= {"storage": {name: _folder(one) for name, one in report.get("storage", {}).items()}}
    for section, facts in sections.items():
        if section in ("ranks", "problems") or not facts:
            continue
        lines.append(section)
        shown = {name: value for name, value in facts.items() if value not in (None, [], {}) and name != "troubles"}
        width = max(map(len, shown), default=0)
        lines += [f"  {name.ljust(width)}  {_text(value, name)}" for name, value in shown.items()]
    if report["ranks"]:
        names = [name for name in ranks.SHOWN if any(rank.get(name) is not None for rank in report["ranks"])]
        rows = [tuple(str(rank.get(name, "-")) for name in names) for rank in report["ranks"][:MOST_RANKS]]
        more = len(report["ranks"]) - len(rows)
        rows += [(f"and {more} more", *[""] * (len(names) - 1))] if more else []
        lines += ["ranks", *(f"  {line}" for line in format_table(names, rows).splitlines())]
    lines.append("")
    for problem in report["problems"]:
        lines.append(f"{'BROKEN' if problem['essential'] else 'advice'}: {problem['what']}")
        lines.append(f"        {problem['fix']}")
    if not any(problem["essential"] for problem in report["problems"]):
        lines.append("everything essential works")
    return "\n".join(lines)


def _folder(facts: Facts) -> str:
    """Return a folder in a line."""
    if "error" in facts:
        return f"{facts['path']} ({facts['type']}): {facts['error']}"
    free, write = quantity(facts["free_bytes"], "B"), f"4 kB written in {facts['write_s'] * 1e3:.3g} ms"
    locks = "locks" if facts["locks"] else "no file locks"
    network = ", network" if facts["network"] else ""
    return f"{facts['path']} ({facts['type']}{network}, {free} free, {write}, {locks})"


def _text(value: Any, name: str = "") -> str:
    if isinstance(value, list):
        return "\n    ".join(["", *map(str, value)]) if any("/" in str(item) for item in value) else ", ".join(value)
    if isinstance(value, int) and name.endswith("_bytes"):
        return quantity(value, "B")
    return ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
