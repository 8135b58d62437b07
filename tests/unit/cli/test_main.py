"""The command line as a process: help, start-up, exit codes, and who speaks when several ranks run it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcnn.cli import main as cli
from hpcnn.errors import ConfigError, DataError
from tests.launch import environment

HEAVY = ("numpy", "mpi4py", "h5py", "msgspec", "tqdm", "threadpoolctl")
# Settings belong into the configuration: a new flag is a decision, and this list is where it shows.
FLAGS = {
    "hpcnn": "--version",
    "hpcnn train": "config --set --out --resume --init --trace --plan",
    "hpcnn evaluate": "run --set --json",
    "hpcnn export": "run --onnx --set",
    "hpcnn plan": "config --ranks --set --machine --ranks-per-node --save --plan --json",
    "hpcnn simulate": (
        "config --ranks --plans --exchanges --algorithms --samples-per-rank --set --machine --ranks-per-node"
        " --breakdown --out"
    ),
    "hpcnn data import": "source --out --size --kind --skip-broken --seed",
    "hpcnn data fetch": "name --out --mirror --from",
    "hpcnn data info": "source",
    "hpcnn profile": "--out --max-bytes --seconds --model --set --batch --preset --layer-seconds",
    "hpcnn analyze information-plane": "run --out --no-plots",
    "hpcnn bench overlap": "config --set --kinds --steps --repeats --json",
    "hpcnn bench allreduce": (
        "--sizes --min-bytes --max-bytes --algorithms --seconds --machine --plot --repeats --json"
    ),
    "hpcnn bench ops": "--models --batch --no-peer --repeats --json",
    "hpcnn bench step": "--models --shards --batch --no-peer --repeats --json",
    "hpcnn scale": (
        "config --ranks --plans --exchanges --algorithms --mode --repeats --steps --set --machine --ranks-per-node"
        " --launcher --launcher-args --sbatch-args --limit --point --out"
    ),
    "hpcnn report": "runs --out --figures",
    "hpcnn doctor": "--json --strict --mpi --out --machine --compile --arch",
    "hpcnn help": "words --man",
}


def flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield (command, flag or argument) of a parser and those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from flags(below)
        elif not isinstance(action, argparse._HelpAction):
            yield parser.prog, (action.option_strings or [action.dest])[-1]


def hpcnn(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `hpcnn` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hpcnn", *words],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment(variables),
    )


def test_bare_command_prints_help_with_every_command() -> None:
    done = hpcnn()
    assert done.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert f"    {name}" in done.stdout
        assert command.help in done.stdout


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys; from hpcnn.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True, env=environment()
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_only_the_chosen_command_is_imported(name: str) -> None:
    others = sorted(set(cli.COMMANDS) - {name})
    code = (
        "import sys; from hpcnn.cli.main import make_parser\n"
        f"make_parser([{name!r}]); print([o for o in {others!r} if 'hpcnn.cli.' + o in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_command_says_of_itself_what_the_overview_says(name: str) -> None:
    parser = cli.make_parser([name])
    listed = parser._subparsers._group_actions[0]._choices_actions
    assert cli.COMMANDS[name].help == next(action.help for action in listed if action.dest == name)


def test_flags_are_the_few_that_were_decided_on() -> None:
    found: dict[str, list[str]] = {}
    for command, flag in flags(cli.make_parser(list(cli.COMMANDS))):
        found.setdefault(command, []).append(flag)
    assert FLAGS == {command: " ".join(names) for command, names in found.items()}


def test_usage_error_exits_with_2_and_only_rank_0_speaks() -> None:
    first, second = hpcnn("trian", PMI_RANK="0"), hpcnn("trian", PMI_RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "invalid choice: 'trian'" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


def test_one_rank_does_what_takes_no_messages(tmp_path: Path) -> None:
    words = ("plan", "lenet5", "--ranks", "2", "--save")
    first, second = (hpcnn(*words, str(tmp_path / f"{rank}.toml"), PMI_RANK=str(rank)) for rank in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert "predicted" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["0.toml"]


def test_configuration_error_is_one_line_and_exits_with_2() -> None:
    done = hpcnn("plan", "lenet5", "--ranks", "2", "--set", "train.learning_rate=1")
    assert done.returncode == 2
    assert done.stderr.startswith("hpcnn: error: config: unknown key 'train.learning_rate'.")
    assert len(done.stderr.splitlines()) == 1


def test_exit_code_tells_the_users_words_from_the_worlds() -> None:
    assert cli.exit_code(ConfigError("x")) == 2
    assert cli.exit_code(DataError("x")) == 1


@pytest.mark.parametrize(
    ("variables", "launched", "rank"),
    [
        ({}, False, 0),
        ({"PMI_RANK": "3"}, True, 3),
        ({"OMPI_COMM_WORLD_RANK": "2", "SLURM_PROCID": "0"}, True, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False, 0),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, True, 1),
        ({"PMI_RANK": "nonsense"}, True, 0),
    ],
)
def test_rank_is_read_from_the_launchers_environment(
    variables: dict[str, str], launched: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI", "SLURM", "MPI_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (launched, rank) == (cli.launched(), cli.launched_rank())
