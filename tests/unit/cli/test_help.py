"""Every command explains itself: what it does, its options with their defaults, examples that work, exit codes."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hpcnn.cli import help as pages
from hpcnn.cli import main as cli
from hpcnn.cli.manual import MANUALS, Manual, explain
from hpcnn.errors import ConfigError
from tests.launch import environment

COMMANDS = {parser.prog: parser for parser, _ in pages.parsers(cli.make_parser(list(cli.COMMANDS)))}
OPERATORS = ("||", "&&", "|", ";")


def words_behind_hpcnn(example: str) -> list[str]:
    """Return what the program gets of a command line: the words behind its name, up to the shell's next operator."""
    words = shlex.split(example)
    words = words[words.index("hpcnn") + 1 :]
    return words[: next((index for index, word in enumerate(words) if word in OPERATORS), len(words))]


@pytest.mark.parametrize("prog", sorted(COMMANDS))
def test_command_has_a_manual(prog: str) -> None:
    assert prog in MANUALS, f"give {prog} a Manual, see hpcnn/cli/manual.py"
    manual, text = MANUALS[prog], COMMANDS[prog].format_help()
    assert text.startswith(f"usage: {prog} ")
    assert len(manual.description.split()) > 10
    assert {0, 2} <= {code for code, _ in manual.exit_codes}
    for section in ("options:", "examples:", "exit codes:"):
        assert f"\n{section}\n" in text
    assert ("files written:" in text) == bool(manual.files)


@pytest.mark.parametrize("prog", sorted(COMMANDS))
def test_examples_parse(prog: str) -> None:
    assert MANUALS[prog].examples
    for example, meaning in MANUALS[prog].examples:
        words = words_behind_hpcnn(example)
        assert f"hpcnn {' '.join(words)}".startswith(prog)
        cli.make_parser(words[:1]).parse_args(words)
        assert meaning


@pytest.mark.parametrize("prog", sorted(COMMANDS))
def test_options_that_take_a_value_tell_their_default(prog: str) -> None:
    silent = [
        action.option_strings[-1]
        for action in COMMANDS[prog]._actions
        if action.option_strings
        and action.nargs not in (0, "?")
        and not any(word in action.help for word in ("default: ", "(repeatable)", "(required)"))
    ]
    assert silent == []


def test_commands_that_a_manual_refers_to_exist() -> None:
    for manual in MANUALS.values():
        for other in manual.see_also:
            words = other.split()
            if words[0] == "hpcnn":
                assert " ".join(word for word in words if not word.startswith("-")) in COMMANDS
            else:
                assert (Path(__file__).resolve().parents[3] / other.split()[0]).exists(), other


def test_text_is_filled_and_examples_keep_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "62")
    parser = argparse.ArgumentParser(prog="hpcnn trial")
    explain(parser, Manual("word " * 30, examples=(("hpcnn trial", "short"), ("hpcnn trial --with more", "long"))))
    lines = parser.format_help().splitlines()
    del MANUALS["hpcnn trial"]
    assert max(map(len, lines)) <= 60
    assert "  hpcnn trial --with more" in lines
    assert lines[lines.index("exit codes:") + 1] == "  0  done"


def test_a_long_command_may_be_copied_from_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    long = "hpcnn plan my.toml --ranks 8 --machine machine.toml --set plan.preset=auto"
    parser = argparse.ArgumentParser(prog="hpcnn trial")
    explain(parser, Manual("word", examples=((long, "short"),)))
    del MANUALS["hpcnn trial"]
    shown = parser.format_help().partition("examples:\n")[2].partition("\n      short")[0]
    assert shown.count("\n") > 0
    assert shlex.split(shown.replace("\\\n", " ")) == shlex.split(long)


def test_help_of_a_command_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["help", "bench", "ops"], ["bench", "ops", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    half = len(text) // 2
    assert text[:half] == text[half:]
    assert text.startswith("usage: hpcnn bench ops")


def test_help_of_no_command_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcnn", "help", "trian"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr


def test_pages_without_their_generator_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argparse_manpage", None)
    monkeypatch.setitem(sys.modules, "argparse_manpage.manpage", None)
    with pytest.raises(ConfigError, match=r"hpcnn\[man\]"):
        pages.write_pages(tmp_path)


class StandIn:
    """What `write_pages` uses of argparse-manpage's Manpage, where that is not installed."""

    def __init__(self, parser: argparse.ArgumentParser, data: dict) -> None:
        self.parser, self.added, self.description, self.prog = parser, [], "", ""

    def add_section(self, heading: str, position: str, content: str) -> None:
        self.added.append(f".SH {heading.upper()}\n{content}\n")

    def __str__(self) -> str:
        return f".SH NAME\n{self.prog} \\- {self.description}\n{self.parser.epilog or ''}{''.join(self.added)}"


@pytest.mark.parametrize("real", [True, False])
def test_every_command_gets_a_page(real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if real:
        pytest.importorskip("argparse_manpage", reason="pip install 'hpcnn[man]'")
    else:
        monkeypatch.setitem(sys.modules, "argparse_manpage", types.ModuleType("argparse_manpage"))
        monkeypatch.setitem(sys.modules, "argparse_manpage.manpage", types.SimpleNamespace(Manpage=StandIn))
    names = {path.stem for path in pages.write_pages(tmp_path / "man1")}
    assert names == {"hpcnn"} | {prog.replace(" ", "-") for prog in COMMANDS}
    page = (tmp_path / "man1" / "hpcnn-train.1").read_text().replace("\\-", "-")
    assert "hpcnn-train - train a network" in page
    assert ".SH EXIT CODES\n.TP\n\\fB0\\fR\ndone" in page
    assert page.count("mpiexec -n 4 hpcnn train resnet20 --out runs/a") == 1


def test_pages_that_cannot_be_written_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argparse_manpage", types.ModuleType("argparse_manpage"))
    monkeypatch.setitem(sys.modules, "argparse_manpage.manpage", types.SimpleNamespace(Manpage=StandIn))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write pages"):
        pages.write_pages(tmp_path / "file" / "man1")
