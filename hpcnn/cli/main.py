"""The `hpcnn` command: finds the chosen command's module, runs it, and turns errors into one line and an exit code.

Commands that use MPI report their errors through `comm.abort`, which knows whether all ranks failed alike.

Start-up is paid on every rank, often from a shared file system: no module but the chosen command's is imported.
A command's module has `add_parser(subparsers)` and `run(args) -> int`; `manual.py` makes its help.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import IO, Any, NamedTuple, NoReturn

from hpcnn import __version__
from hpcnn.errors import ConfigError, HpcnnError, one_line, out_of_memory

EXIT_FAILURE, EXIT_USAGE = 1, 2
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_RANKID")


class Command(NamedTuple):
    """One line of `hpcnn --help`, and whether these arguments need MPI."""

    help: str
    needs_mpi: Callable[[argparse.Namespace], bool]


COMMANDS: dict[str, Command] = {
    "train": Command("train a network (start it with mpirun or srun)", lambda args: True),
    "evaluate": Command("measure a trained network on the test images", lambda args: True),
    "export": Command("write a trained network as an ONNX file", lambda args: False),
    "plan": Command("print each layer's layout and costs for a number of ranks", lambda args: False),
    "simulate": Command("predict training steps on machines that are not at hand", lambda args: False),
    "data": Command("import, inspect or fetch data sets", lambda args: args.action == "import"),
    "profile": Command("measure this machine's messages and arithmetic (with mpirun)", lambda args: True),
    "analyze": Command("tables and pictures of what a run recorded about its network", lambda args: False),
    "bench": Command("time all-reduce algorithms, operators or training steps", lambda args: True),
    "scale": Command("measure how training scales over ranks, plans and algorithms", lambda args: False),
    "report": Command("make an HTML page of runs: where the time went, curves, layers", lambda args: False),
    "doctor": Command("check this installation and say how to mend it", lambda args: args.mpi or launched()),
    "help": Command("print a command's manual, or write pages for man", lambda args: False),
}


class Parser(argparse.ArgumentParser):
    """A parser whose help and complaints are printed once, not by every rank."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if launched_rank() == 0:
            super()._print_message(message, file)


def launched() -> bool:
    """Return whether a launcher started this process; a batch script, which has Slurm's variables too, is none."""
    return any(name in os.environ for name in _RANK_VARIABLES) or "SLURM_STEP_ID" in os.environ


def launched_rank() -> int:
    """Return this process's rank as the launcher's environment tells it, before MPI starts; 0 without a launcher."""
    for name in (*_RANK_VARIABLES, "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def make_parser(chosen: Sequence[str]) -> Parser:
    """Return the parser, with the flags of the chosen commands only."""
    parser = Parser(
        prog="hpcnn",
        description="Train convolutional networks with MPI.",
        epilog="`hpcnn help COMMAND` explains one. A bare `hpcnn train` trains LeNet-5 on built-in images.",
    )
    parser.add_argument("--version", action="version", version=f"hpcnn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        if name in chosen:
            _module(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command in `argv` (without the program's name) and return its exit code; errors pass through."""
    parser = make_parser([word for word in argv if not word.startswith("-")][:1])
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    run = _module(args.command).run
    if not COMMANDS[args.command].needs_mpi(args):
        return int(run(args)) if launched_rank() == 0 else 0  # it is one rank's work, and several would write one file
    from hpcnn.comm.abort import run_and_exit  # imports NumPy, which the other commands may do without

    return run_and_exit(lambda: int(run(args)))


def entry() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or configuration, 75 checkpointed, run again."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files may be no text at all
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:2] == ["train"]:
        # Until somebody listens (train/signals.py): it would end a rank that is still importing its libraries.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        code = main(sys.argv[1:])
    except (HpcnnError, MemoryError) as error:
        words = out_of_memory(error) if isinstance(error, MemoryError) else str(error)
        if launched_rank() == 0:
            print(f"hpcnn: error: {one_line(words)}", file=sys.stderr)
        code = EXIT_FAILURE if isinstance(error, MemoryError) else exit_code(error)
    except BrokenPipeError:  # `hpcnn plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILURE
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def exit_code(error: HpcnnError) -> int:
    """Return 2 for what the user typed or configured, 1 for everything else."""
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE


def _module(command: str) -> Any:
    return import_module(f"hpcnn.cli.{command}")
