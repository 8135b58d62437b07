"""Sources become machine code once, and again when anything that it depends on changes."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import pytest

from hpcnn.errors import DeviceError
from hpcnn.ops.cuda import compile
from hpcnn.ops.cuda.compile import CompileError, Compiler
from tests.unit.kernels.runtime.fake_compiler import Counting


def test_source_is_compiled_once_and_then_read(compiler: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compile, "on_compile", said.append)
    assert {compile.cubin("plain", 90) for _ in range(3)} == {b"code of plain for 90a"}
    assert compile.cubin("plain", 80) == b"code of plain for 80"
    assert [call[:2] for call in compiler.calls()] == [["plain", "90a"], ["plain", "80"]]
    assert said == ["compiling kernels plain for sm_90a", "compiling kernels plain for sm_80"]


@pytest.mark.parametrize("changed", ["plain.cu", "deep.cuh", "common.cuh"])
def test_change_of_source_or_header_compiles_again(changed: str, compiler: Counting, kernels: Path) -> None:
    compile.cubin("plain", 80)
    with (kernels / changed).open("a") as file:
        file.write("// changed\n")
    compile.cubin("plain", 80)
    assert len(compiler.calls()) == 2


def test_another_compiler_compiles_again(compiler: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    compile.cubin("plain", 80)
    monkeypatch.setattr(compile, "compiler", lambda: Compiler("test 1.1", compiler))
    compile.cubin("plain", 80)
    assert len(compiler.calls()) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_machine_code_is_compiled_again(damage: bytes | None, compiler: Counting, place: Path) -> None:
    code = compile.cubin("plain", 80)
    (file,) = place.glob("*.cubin")
    contents = file.read_bytes()
    assert contents == code + hashlib.sha256(code).digest()
    file.write_bytes(bytes([contents[0] ^ 1]) + contents[1:] if damage is None else damage)
    assert compile.cubin("plain", 80) == code
    assert len(compiler.calls()) == 2
    assert file.read_bytes() == contents


def test_processes_that_need_the_same_source_compile_it_once(compiler: Counting) -> None:
    compiler.seconds = 0.5
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=compile.cubin, args=("plain", 90)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(compiler.calls()) == 1


def test_source_for_one_architecture_is_refused_on_others(compiler: Counting) -> None:
    assert compile.cubin("hopper", 90)
    with pytest.raises(DeviceError, match=r"hopper is for sm_90a, not for sm_80"):
        compile.cubin("hopper", 80)


def test_source_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"no source .*nonsense\.cu"):
        compile.cubin("nonsense", 80)


def test_refusal_names_the_first_error_and_keeps_the_log(compiler: Counting, kernels: Path, place: Path) -> None:
    (kernels / "plain.cu").write_text("broken\n")
    with pytest.raises(DeviceError) as raised:
        compile.cubin("plain", 80)
    message = str(raised.value)
    assert "plain does not compile for sm_80 with test 1.0: " in message
    assert 'error: identifier "broken" is undefined' in message
    assert "warning: hm" not in message
    assert str(place / "plain-sm_80.log") in message
    assert "warning: hm" in (place / "plain-sm_80.log").read_text()


def test_all_is_compiled_for_what_it_is_for_and_failures_are_lines(compiler: Counting, kernels: Path) -> None:
    (kernels / "plain.cu").write_text("broken\n")
    compile.cubin("hopper", 90)
    report = compile.compile_all(["80", 90, "90a"])
    assert [(line.source, line.target, line.cached) for line in report] == [
        ("plain", "80", False), ("hopper", "90a", True), ("plain", "90a", False),
    ]  # fmt: skip
    assert ["identifier" in line.problem for line in report] == [True, False, True]
    assert report[1].num_bytes == len(b"code of hopper for 90a")


def test_fingerprint_depends_on_every_file(kernels: Path) -> None:
    found = {compile.fingerprint()}
    for path in sorted(kernels.iterdir()):
        path.write_text(path.read_text() + "// changed\n")
        found.add(compile.fingerprint())
    assert len(found) == 5


def test_packaged_sources_are_found() -> None:
    assert (compile.folder() / "common.cuh").exists()
    assert "delay" in compile.sources()


def test_real_compiler_makes_machine_code_and_reports_errors(tmp_path: Path, place: Path) -> None:
    try:
        chosen = compile.compiler()
    except DeviceError as error:
        pytest.skip(str(error))
    assert chosen.run(compile.folder() / "delay.cu", "90a").startswith(b"\x7fELF")
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("int x = broken;\n")
    with pytest.raises(CompileError, match="broken"):
        chosen.run(wrong, "80")
