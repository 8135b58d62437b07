"""What the tests of the runtime stand on: an empty cache, sources, a compiler and a GPU of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcnn.ops.cuda import cache, compile
from hpcnn.ops.cuda.compile import Compiler
from tests.unit.kernels.runtime import fake_cupy
from tests.unit.kernels.runtime.fake_compiler import Counting


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty, and a spare one beside it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


@pytest.fixture
def kernels(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources: one that includes headers, one for sm_90a only."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "common.cuh").write_text("// nothing\n")
    (folder / "deep.cuh").write_text('#include "common.cuh"\n')
    (folder / "plain.cu").write_text('// plain\n#include "deep.cuh"\n#include <cuda_bf16.h>\n')
    (folder / "hopper.cu").write_text("// Uses what only sm_90a has.\n// architectures: 90a\n")
    monkeypatch.setattr(compile, "folder", lambda: folder)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """A compiler of the tests' own in place of CUDA's."""
    counting = Counting(tmp_path / "calls")
    monkeypatch.setattr(compile, "compiler", lambda: Compiler("test 1.0", counting))
    return counting


@pytest.fixture
def gpu(compiler: Counting, monkeypatch: pytest.MonkeyPatch) -> fake_cupy.Driver:
    """The driver behind a CuPy that computes nothing and notes everything."""
    return fake_cupy.install(monkeypatch)
