"""Every kernel compiles for every architecture it is for, and keeps its values in registers."""

from __future__ import annotations

import faulthandler
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("report_kernels", ROOT / "scripts" / "report_kernels.py")
report_kernels = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = report_kernels
SPEC.loader.exec_module(report_kernels)

SOURCES = sorted(report_kernels.KERNELS.glob("*.cu"))
JOBS = [(source.stem, target) for source in SOURCES for target in report_kernels.targets(source)]
ALLOWED_SPILLS = {
    # Tiles that take all 255 registers of a thread: a few addresses of the copies go out.
    r"conv2d_(forward|weight)_mma_(128x128|256x128|256x64)\w*": 48,
    # Launch bounds hold these to 128 or 168 registers, so that two or three blocks share a multiprocessor.
    r"conv2d_(forward|input|weight)_simt_(64x64|128x64|128x128)_v[14]_(f32|bf16)": 312,
}
"""Bytes of stores and loads together that kernels may spill, by patterns of their names; others may not."""

needs_nvcc = pytest.mark.skipif(report_kernels.nvcc() is None, reason="compiling kernels needs nvcc")


@cache
def started():
    """Begin with all files at once: each test waits for its own only."""
    return report_kernels.start(SOURCES)


def allowed_spills(kernel: str) -> int:
    return max((limit for pattern, limit in ALLOWED_SPILLS.items() if re.fullmatch(pattern, kernel)), default=0)


@needs_nvcc
@pytest.mark.parametrize(("source", "target"), JOBS)
def test_kernels_compile_without_spills(source, target) -> None:
    faulthandler.cancel_dump_traceback_later()  # a busy machine may take more than its minute for a large file
    report = started()[source, target].result()
    assert report.problem == ""
    assert report.complaints == []
    assert report.usages, "no kernel in the file"
    print("\n".join(report_kernels.table([report])))
    assert {usage.kernel: usage.spills for usage in report.usages if usage.spills > allowed_spills(usage.kernel)} == {}


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 16 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compile time = 10.847 ms
ptxas info    : Compiling entry function 'backward_errors' for 'sm_90a'
ptxas info    : Function properties for backward_errors
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""


def test_what_the_assembler_says_is_read() -> None:
    usages, complaints = report_kernels.parse(PTXAS)
    assert usages == [
        report_kernels.Usage("forward", "90a", 58, 16, 8, 4, 8192),
        report_kernels.Usage("backward_errors", "90a", 32),
    ]
    assert usages[0].spills == 12
    assert len(complaints) == 1
    lines = list(report_kernels.table([report_kernels.Report("conv2d", "90a", usages, complaints)]))
    assert ["forward", "58", "/", "12", "/", "8192"] == lines[-1].split()


def test_files_may_be_for_some_architectures_only(tmp_path) -> None:
    source = tmp_path / "x.cu"
    for text, expected in (
        ("// architectures: 90a\n", ["90a"]),
        ("// A file.\n// architectures: 90a, 100\n", ["90a", "100"]),
        ("int x;  // architectures: 90a\n", ["80", "90a", "100"]),
    ):
        source.write_text(text)
        assert expected == report_kernels.targets(source)


@needs_nvcc
def test_spills_and_errors_are_found(tmp_path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(
        '#include "common.cuh"\n'
        'extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {\n'
        "    float values[64];\n"
        "#pragma unroll\n    for (int i = 0; i < 64; i++) values[i] = x[i * 1024 + threadIdx.x];\n"
        "    __syncthreads();\n"
        "#pragma unroll\n    for (int i = 0; i < 64; i++) x[threadIdx.x * 64 + i] = values[63 - i] * values[i];\n"
        "}\n"
    )
    report = report_kernels.compile_file(source, "90a")
    assert report.problem == ""
    assert [usage.kernel for usage in report.usages] == ["spilling"]
    assert report.usages[0].spills > allowed_spills("spilling") == 0
    source.write_text('extern "C" __global__ void broken() { return 1; }\n')
    assert "error" in report_kernels.compile_file(source, "90a").problem
