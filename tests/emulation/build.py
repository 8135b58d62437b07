"""Kernels as shared libraries of the host: found, compiled once, and kept by the hash of all they are made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from hpcnn.ops.cuda.compile import closure

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
BUILD = HERE / "build"
COMPILER = shutil.which("g++")
RUNTIME = (HERE / "runtime.cpp", HERE / "tensor.cpp")
CHECKS = ("-O2", "-fsanitize=bounds,alignment,integer-divide-by-zero", "-fno-sanitize-recover=all")
FLAGS = (
    *("-std=c++17", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-attributes", "-DHPCNN_EMULATION"),
)
# As the preprocessor leaves a kernel with HPCNN_EMULATION_NAMES: bounds and clusters stand on either side of void.
ATTRIBUTES = r"((?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*)"
KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+{ATTRIBUTES}void\s+{ATTRIBUTES}(\w+)\s*\(')
BOUNDS = re.compile(r"__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)")
CLUSTER = re.compile(r"__cluster_dims__\s*\(((?:[^()]|\([^()]*\))*)\)")


class EmulationError(RuntimeError):
    """A kernel did what a GPU would not allow, or cannot be compiled."""


def parts(source: Path) -> list[Path]:
    """Return the file and all that it includes by quoted names, from its own folder, `kernels/` or here."""
    return closure(source, KERNELS, HERE)


def content_hash(paths: list[Path], *more: str) -> str:
    """Return a hash of the files' contents and of some text."""
    whole = hashlib.sha256("\0".join(more).encode())
    for path in sorted(paths):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


@cache
def _compiler() -> str:
    """Return what the compiler is and what `-march=native` means to it."""
    if COMPILER is None:
        raise EmulationError("emulation: there is no g++; install one to run kernels on the CPU.")
    command = [COMPILER, "-v", "-march=native", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def run(command: list[str], what: str) -> str:
    """Run a compiler; its standard output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"emulation: {what} does not compile.\n{done.stderr[:10000]}")
    return done.stdout


def kernel_names(source: Path, includes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Return name, launch bounds and extents of clusters of every kernel of a file, macros expanded."""
    command = [COMPILER or "", "-E", "-P", "-x", "c++", *FLAGS, "-DHPCNN_EMULATION_NAMES", *includes, str(source)]
    text = run(command, source.name)
    found = []
    for before, after, name in KERNEL.findall(text):
        bounds, cluster = BOUNDS.search(before + after), CLUSTER.search(before + after)
        found.append((name, bounds[1] if bounds else "1024", cluster[1] if cluster else "1"))
    return found


def library(source: Path) -> Path:
    """Return the shared library of a kernel file, which is compiled if none of the same contents is there."""
    source = source.resolve()
    compiler = _compiler()
    includes = ("-I", str(HERE), "-I", str(KERNELS), "-I", str(source.parent))
    runtime = HERE / "runtime.cpp"
    target = (
        BUILD / f"{source.stem}-{content_hash([*parts(source), *parts(runtime), Path(__file__)], compiler, *FLAGS)}.so"
    )
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{source.stem}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        names = kernel_names(source, includes)
        if not names:
            raise EmulationError(f'emulation: {source.name} has no extern "C" __global__ function.')
        entries = "".join(
            f'    emulation::kernel<::{name}, {cluster}>("{name}", {bounds}),\n' for name, bounds, cluster in names
        )
        driver = Path(folder) / "driver.cpp"
        driver.write_text(
            f'#include "{source}"\n#include "entry.h"\n'
            f"const emulation::Kernel emulation::kernels[] = {{\n{entries}}};\n"
            f"const unsigned int emulation::num_kernels = {len(names)};\n"
        )
        made = Path(folder) / target.name
        # The link has no -fsanitize: runtime.cpp has the functions that the checks call.
        objects = [str(Path(folder) / "driver.o"), *(str(_runtime(part)) for part in RUNTIME)]
        run([compiler_path(), *FLAGS, *CHECKS, *includes, "-c", str(driver), "-o", objects[0]], source.name)
        run([compiler_path(), "-shared", *objects, "-o", str(made)], source.name)
        for old in BUILD.glob(f"{source.stem}-*.so"):
            old.unlink(missing_ok=True)
        made.replace(target)
    return target


def compiler_path() -> str:
    """Return the compiler, which `_compiler` has found."""
    assert COMPILER is not None
    return COMPILER


def _runtime(source: Path) -> Path:
    """Return the object file of a part of the runtime, compiled if need be."""
    target = BUILD / f"{source.stem}-{content_hash([*parts(source), Path(__file__)], _compiler())}.o"
    with open(BUILD / "runtime.lock", "w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = Path(folder) / target.name
            run([compiler_path(), *FLAGS, "-O3", "-I", str(HERE), "-c", str(source), "-o", str(made)], source.name)
            made.replace(target)
    return target
