#!/usr/bin/env python
"""Run commands on hostile inputs: each must work, or say in one line what is wrong, in bounded time and memory.

    python scripts/fuzz.py --cases 2000 --jobs 2
    python scripts/fuzz.py --kinds checkpoint --first 17 --cases 1 --keep    # that case again, and what it was given

Most cases run in a fork of this process, which has loaded what commands load; one in `--ranks-every` is started by
mpiexec on two ranks. What fails is kept below --out, with its command and what it said. Exit status 1 if anything did.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # a fork must not inherit threads

from scripts.hostile.inputs import KINDS, Case, Sources, make  # noqa: E402

MEMORY_BYTES = 4 << 30
TIMEOUT_S = 30.0
MARK = "HPCNN_FUZZ_CASE"
CODES = {0, 1, 2}
LOADED = ("h5py", "PIL.Image", "hpcnn.cli.plan", "hpcnn.data.importers", "hpcnn.train.setup")
"""In this process, so that its forks have it."""


def run_case(case: Case, folder: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command in a fork, in `folder`, and return what is wrong with how it ended; "" if nothing is."""
    child = os.fork()
    if child == 0:
        _become(case, folder)
    deadline = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"still running after {timeout_s} s"
        time.sleep(0.005)
    return judge(case, folder, os.waitstatus_to_exitcode(status))


def _become(case: Case, folder: Path) -> None:
    """Turn this fork into the command; never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, ".stdout"), (2, ".stderr")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["hpcnn", *case.arguments]
        from hpcnn.cli.main import entry

        entry()
    except SystemExit as stop:
        code = int(stop.code or 0) if isinstance(stop.code, int | None) else 71
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_job(case: Case, folder: Path, name: str, num_ranks: int = 2, timeout_s: float = 3 * TIMEOUT_S) -> str:
    """Run a command on ranks that mpiexec starts, and return what is wrong with how it ended; "" if nothing is."""
    environment = os.environ | {
        MARK: name,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = ["mpiexec", "-n", str(num_ranks), sys.executable, "-m", "hpcnn", *case.arguments]
    with (folder / ".stdout").open("wb") as out, (folder / ".stderr").open("wb") as err:
        job = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = job.wait(timeout_s)
        except subprocess.TimeoutExpired:
            job.terminate()
            job.wait(10)
            return f"{num_ranks} ranks were still running after {timeout_s} s"
    time.sleep(0.2)
    left = _marked(name)
    for process in left:
        os.kill(process, signal.SIGKILL)
    return f"{len(left)} processes were left behind" if left else judge(case, folder, code)


def _marked(name: str) -> list[int]:
    """Return the processes of a job, by what it put into their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"{MARK}={name}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def judge(case: Case, folder: Path, code: int) -> str:
    """Return what is wrong with an exit code, and with what a command has said and left behind; "" if nothing is."""
    said = (folder / ".stderr").read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("hpcnn: error")]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if "Traceback" in said:
        return "a traceback"
    if code not in CODES:
        return f"exit code {code}"
    if "Warning" in said:
        return "a warning of a library"
    if code == 0:
        return "an error, and exit code 0" if errors else ""
    if len(errors) != 1:
        return f"{len(errors)} errors instead of one"
    left = [name for name in case.outputs if (folder / name).exists()]
    left += [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".importing", ".packing"))]
    return f"it failed and left {left[0]}" if left else ""


def attempt(index: int) -> tuple[str, int, str, str]:
    """Make and run one case of the chosen ones; return its kind and number, how it ended, and what is wrong with it."""
    args, sources, out = _chosen
    kind, number = args.kinds[index % len(args.kinds)], args.first + index // len(args.kinds)
    folder = out / f"{kind}-{number}"
    case = make(kind, number, args.seed, sources, folder)
    on_ranks = bool(args.ranks_every) and index % args.ranks_every == args.ranks_every - 1
    wrong = run_job(case, folder, folder.name) if on_ranks else run_case(case, folder)
    (folder / ".command").write_text(f"{'mpiexec -n 2 ' if on_ranks else ''}hpcnn {' '.join(case.arguments)}\n")
    refused = "hpcnn: error" in (folder / ".stderr").read_text(errors="replace")
    if not wrong and not args.keep:
        shutil.rmtree(folder)
    return kind, number, "wrong" if wrong else "refused" if refused else "worked", wrong


def main() -> int:
    """Run the cases, print a line for each that failed and a table at the end."""
    global _chosen
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200, metavar="N", help="inputs, over all kinds (default: 200)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="key of all draws (default: 1)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default: 2)")
    parser.add_argument(
        "--ranks-every", type=int, default=50, metavar="N", help="run one of N on two ranks (default: 50; 0: none)"
    )
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="where failing cases are kept (default: fuzz)")
    parser.add_argument("--keep", action="store_true", help="keep all cases")
    args = parser.parse_args()
    for module in LOADED:
        import_module(module)
    out = args.out.resolve()
    if (out / "sources").exists():
        shutil.rmtree(out)
    sources, counts = Sources(out / "sources"), Counter[tuple[str, str]]()
    sources.checkpoint()
    _chosen, begin = (args, sources, out), time.monotonic()
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for kind, number, end, wrong in pool.imap(attempt, range(args.cases)):
            counts[kind, end] += 1
            if wrong:
                print(f"{kind} {number}: {wrong} ({out / f'{kind}-{number}'})", flush=True)
    for kind in args.kinds:
        print(f"{kind:12}", *(f"{counts[kind, what]:5} {what}" for what in ("worked", "refused", "wrong")))
    print(f"{args.cases} cases of seed {args.seed} in {time.monotonic() - begin:.0f} s")
    return int(any(what == "wrong" for _, what in counts))


_chosen: Any = None
"""Arguments, sources and folder, for the processes of the pool, which are forks of this one."""

if __name__ == "__main__":
    sys.exit(main())
