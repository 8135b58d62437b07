"""The core type that OpenBLAS is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpcnn import blas

AVX512 = "avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """Choose for a made-up processor, in a process that has not loaded NumPy."""

    def run(vendor, flags):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: x\nflags\t\t: fpu sse2 {flags} avx\n\n")
        monkeypatch.delitem(sys.modules, "numpy", raising=False)
        return blas.choose_core_type(path)

    monkeypatch.setenv(blas.CORE_TYPE, "")
    monkeypatch.delenv(blas.CORE_TYPE)
    return run


def test_amd_processors_with_avx512_get_its_kernels(choose):
    assert choose("AuthenticAMD", AVX512) == "SkylakeX"
    assert os.environ[blas.CORE_TYPE] == "SkylakeX"


@pytest.mark.parametrize(
    ("vendor", "flags"),
    [("GenuineIntel", AVX512), ("AuthenticAMD", "avx2 fma"), ("AuthenticAMD", "avx512f avx512dq"), ("", "")],
)
def test_on_others_the_guess_of_the_library_stands(choose, vendor, flags):
    assert choose(vendor, flags) is None
    assert blas.CORE_TYPE not in os.environ


def test_the_choice_of_the_user_stands(choose, monkeypatch):
    monkeypatch.setenv(blas.CORE_TYPE, "Zen")
    assert choose("AuthenticAMD", AVX512) is None
    assert os.environ[blas.CORE_TYPE] == "Zen"


def test_nothing_is_set_when_numpy_is_loaded_already(monkeypatch, tmp_path):
    monkeypatch.setenv(blas.CORE_TYPE, "")
    monkeypatch.delenv(blas.CORE_TYPE)
    monkeypatch.setitem(sys.modules, "numpy", sys)
    path = tmp_path / "cpuinfo"
    path.write_text(f"vendor_id : AuthenticAMD\nflags : {AVX512}\n")
    assert blas.choose_core_type(path) is None
    assert blas.CORE_TYPE not in os.environ


def test_a_system_without_cpuinfo_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(blas.CORE_TYPE, "")
    monkeypatch.delenv(blas.CORE_TYPE)
    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    assert blas.choose_core_type(tmp_path / "missing") is None


def test_importing_the_package_does_not_load_numpy_first():
    code = "import sys, hpcnn; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
