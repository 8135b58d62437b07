"""What the doctor says of GPUs, and how it compiles their kernels, with a CuPy and a compiler of the tests' own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpcnn.cli import doctor, gpus
from hpcnn.cli.main import main
from hpcnn.errors import ConfigError, DeviceError
from hpcnn.ops.cuda import cache, compile
from hpcnn.ops.cuda.compile import Compiled, CompileError, Compiler
from tests.unit.kernels.runtime import fake_cupy


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that refuses one of two sources; it notes what it compiles."""
    done: list[str] = []

    def run(source: Path, target: str) -> bytes:
        done.append(f"{source.stem} {target}")
        if source.stem == "wrong":
            raise CompileError("wrong.cu(1): error: it is wrong")
        return b"code"

    for name in ("right", "wrong"):
        (tmp_path / f"{name}.cu").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "folder", lambda: tmp_path)
    monkeypatch.setattr(compile, "compiler", lambda: Compiler("test 1.0", run))
    monkeypatch.setattr(compile, "on_compile", compile.on_compile)
    return done


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.Driver:
    """The driver behind a CuPy that computes nothing, on a host without nvidia-smi."""
    monkeypatch.setattr("shutil.which", lambda name, **options: None)
    return fake_cupy.install(monkeypatch)


def _no_compiler() -> Compiler:
    raise DeviceError("kernels: no CUDA compiler. Install one.")


def test_gpus_software_and_compiler_are_reported(gpu: fake_cupy.Driver, compiler: list[str]) -> None:
    facts = gpus.facts()
    assert facts["devices"] == [f"{index}: Fake GPU, sm_90, 1 kB, 132 processors" for index in (0, 1)]
    assert (facts["cupy"], facts["driver"]) == ("14.0.0", "for CUDA 13.2")
    assert facts["compiler"].startswith("test 1.0, ")
    assert facts["used"].startswith("yes")
    assert facts["troubles"] == []


def test_driver_that_is_too_old_is_a_trouble_with_its_fix(gpu: fake_cupy.Driver, compiler: list[str]) -> None:
    gpu.status, gpu.driver_version = 35, 12040
    facts = gpus.facts()
    (trouble,) = facts["troubles"]
    assert facts["used"].startswith("no: the driver is for CUDA 12.4")
    assert "hpcnn[cuda12]" in trouble["fix"]


def test_missing_compiler_is_a_trouble_with_its_fix(gpu: fake_cupy.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "compiler", _no_compiler)
    (trouble,) = gpus.facts()["troubles"]
    assert trouble == {"what": "kernels: no CUDA compiler", "fix": "Install one."}


@pytest.mark.parametrize(("listed", "troubles"), [("", 0), ("GPU 0: NVIDIA H100 (UUID: GPU-1)\n", 1)])
def test_missing_cupy_is_a_trouble_only_where_there_is_a_gpu(
    listed: str, troubles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("shutil.which", lambda name, **options: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(gpus, "output", lambda command: listed)
    facts = gpus.facts()
    assert len(facts["found"]) == len(facts["troubles"]) == troubles
    assert all("hpcnn[cuda13]" in trouble["fix"] + trouble["what"] for trouble in facts["troubles"])
    assert facts["used"].startswith("no: ")
    assert "compiler" not in facts


def test_troubles_become_advice() -> None:
    trouble = {"what": "gpu: it is old", "fix": "Buy one."}
    report = {"packages": dict.fromkeys(doctor.environment.REQUIRED, "1"), "operators": {}, "launcher": {}}
    (problem,) = doctor.judge(report | {"gpu": {"troubles": [trouble]}})
    assert problem == doctor.Problem("gpu: it is old", "Buy one.", essential=False)
    text = doctor.render({"gpu": {"used": "no", "troubles": [trouble]}, "ranks": [], "problems": [problem._asdict()]})
    assert text.count("Buy one.") == 1


def test_compile_fills_the_cache_and_fails_where_a_source_does(
    compiler: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--compile", "--arch", "80, sm_90"]) == 1
    assert sorted(compiler) == ["right 80", "right 90a", "wrong 80", "wrong 90a"]
    printed = capsys.readouterr()
    assert "compiling kernels right for sm_80" in printed.err
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[2] == ["right", "sm_80", "0.0", "4", "compiled"]
    assert [line[4] for line in lines[2:6]] == ["compiled", "FAILED"] * 2
    assert "wrong does not compile for sm_80 with test 1.0: wrong.cu(1): error: it is wrong" in printed.out
    assert main(["doctor", "--arch", "80", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(line["source"], line["cached"]) for line in report] == [("right", True), ("wrong", False)]


def test_compile_is_for_the_gpus_here_unless_told_otherwise(
    gpu: fake_cupy.Driver, compiler: list[str], tmp_path: Path
) -> None:
    (tmp_path / "wrong.cu").unlink()
    assert main(["doctor", "--compile"]) == 0
    assert compiler == ["right 90a"]
    gpu.status = 100
    with pytest.raises(DeviceError, match=r"Name it: --arch"):
        gpus.compile_kernels(None)


@pytest.mark.parametrize("name", ["", "hopper", "80,", "9"])
def test_architectures_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no architecture"):
        gpus.compile_kernels(name)


def test_table_shows_what_was_cached() -> None:
    lines = [Compiled("a", "80", 1.25, 10, False)._asdict(), Compiled("b", "90a", 0.0, 20, True)._asdict()]
    rows = [line.split() for line in gpus.compiled_table(lines).splitlines()[2:]]
    assert rows == [["a", "sm_80", "1.2", "10", "compiled"], ["b", "sm_90a", "0.0", "20", "cached"]]
