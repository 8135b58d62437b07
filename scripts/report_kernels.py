"""What nvcc makes of every kernel: registers, spills, and shared memory, by architecture. Needs no GPU.

    python scripts/report_kernels.py [-a 80,90a,100] [source ...]

A line `// architectures: 90a` among the first of a file names the only ones that it is compiled for.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpcnn.ops.cuda import compile

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
BUILD = ROOT / "build" / "kernels"
TARGETS = ("80", "90a", "100")
OPTIONS = ("--std=c++17", "-cubin", "-Xptxas", "-v")
PROCESSES = 2

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
COMPLAINT = re.compile(r"\b(warning|error)\b|performance loss", re.IGNORECASE)


@dataclass
class Usage:
    """What one kernel needs on one architecture; shared memory is the static part."""

    kernel: str
    target: str
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0

    @property
    def spills(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


@dataclass
class Report:
    """What the compiler said of one file for one architecture."""

    source: str
    target: str
    usages: list[Usage]
    complaints: list[str]
    problem: str = ""


def nvcc() -> str | None:
    """Return the compiler, if there is one."""
    return shutil.which("nvcc") or next(map(str, Path("/usr/local").glob("cuda*/bin/nvcc")), None)


def targets(source: Path) -> list[str]:
    """Return the architectures that a file is compiled for, of TARGETS."""
    only = compile.restriction_of(source.read_text())
    return [target for target in TARGETS if not only or target in only]


def parse(text: str) -> tuple[list[Usage], list[str]]:
    """Return what `-Xptxas -v` says of each kernel, and every complaint among it."""
    usages: list[Usage] = []
    complaints = []
    subject = None  # the kernel that "Used" belongs to; lines of functions that were not inlined stand between
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            subject = Usage(entry[1], entry[2])
            usages.append(subject)
        elif subject and (spills := SPILLS.search(line)):
            # Those of functions that it calls count as its own.
            subject.stack_bytes += int(spills[1])
            subject.spill_store_bytes += int(spills[2])
            subject.spill_load_bytes += int(spills[3])
        elif subject and (used := USED.search(line)):
            subject.registers = int(used[1])
            shared = SHARED.search(line)
            subject.shared_bytes = int(shared[1]) if shared else 0
        elif COMPLAINT.search(line):
            complaints.append(line.strip())
    return usages, complaints


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler; a system that is short of something for a moment may refuse to start it, so try three times."""
    for pause_s in (1, 5):
        try:
            return subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            print(f"{command[0]} did not start: {error}. Trying again in {pause_s} s.", file=sys.stderr)
            time.sleep(pause_s)
    return subprocess.run(command, capture_output=True, text=True)


def compile_file(source: Path, target: str) -> Report:
    """Compile one file for one architecture; what was compiled before is read from `build/kernels`."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc")
    log = BUILD / f"{source.stem}-sm_{target}-{_key(source, target, compiler)}.log"
    if not log.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            command = [compiler, *OPTIONS, f"-arch=sm_{target}", "-I", str(source.parent), "-I", str(KERNELS)]
            command += ["-o", f"{folder}/{source.stem}.cubin", str(source)]
            done = _run(command)
            text = done.stdout + done.stderr
            if done.returncode:
                return Report(source.stem, target, [], [], text)
            for old in BUILD.glob(f"{source.stem}-sm_{target}-*.log"):
                old.unlink(missing_ok=True)
            new = Path(folder) / log.name
            new.write_text(text)
            new.replace(log)
    return Report(source.stem, target, *parse(log.read_text()))


def start(sources: Iterable[Path], wanted: Iterable[str] = TARGETS) -> dict[tuple[str, str], Future[Report]]:
    """Begin to compile files, PROCESSES at a time, in the order of the result: (source, target) -> report."""
    pool = ThreadPoolExecutor(PROCESSES)
    jobs = [(source, target) for source in sources for target in targets(source) if target in wanted]
    futures = {(source.stem, target): pool.submit(compile_file, source, target) for source, target in jobs}
    pool.shutdown(wait=False)
    return futures


def _key(source: Path, target: str, compiler: str) -> str:
    """Return a hash of all that machine code depends on."""
    digest = hashlib.sha256("\0".join((target, str(Path(compiler).resolve()), *OPTIONS)).encode())
    for path in sorted(compile.closure(source, KERNELS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def table(reports: Iterable[Report]) -> Iterator[str]:
    """Yield the lines of a table: kernels down, three numbers for each architecture."""
    rows: dict[tuple[str, str], dict[str, Usage]] = {}
    seen: dict[str, None] = {}
    for report in reports:
        seen[report.target] = None
        for usage in report.usages:
            rows.setdefault((report.source, usage.kernel), {})[report.target] = usage
    columns = [target for target in TARGETS if target in seen]
    width = max((len(kernel) for _, kernel in rows), default=0)
    yield "registers / bytes spilled / bytes of static shared memory"
    yield f"{'kernel':{width}}" + "".join(f"{'sm_' + target:>18}" for target in columns)
    for (_, kernel), usages in sorted(rows.items()):
        cells = [usages.get(target) for target in columns]
        texts = [f"{cell.registers} / {cell.spills} / {cell.shared_bytes}" if cell else "-" for cell in cells]
        yield f"{kernel:{width}}" + "".join(f"{text:>18}" for text in texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", help="files of kernels/ without their ending (default: all)")
    parser.add_argument("-a", "--architectures", default=",".join(TARGETS), help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if nvcc() is None:
        parser.error("there is no nvcc on PATH; install the CUDA toolkit")
    paths = [KERNELS / f"{name}.cu" for name in chosen.sources] or sorted(KERNELS.glob("*.cu"))
    reports = [future.result() for future in start(paths, chosen.architectures.split(",")).values()]
    for line in table(reports):
        print(line)
    for report in reports:
        for line in [*report.complaints, *report.problem.splitlines()]:
            print(f"{report.source}.cu, sm_{report.target}: {line}")
    return int(any(report.problem for report in reports))


if __name__ == "__main__":
    sys.exit(main())
