"""`hpcnn help [COMMAND ...]`: a command's manual, and manual pages for `man` made of all of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from hpcnn import __version__
from hpcnn.cli import main as cli
from hpcnn.cli.manual import MANUALS, Manual, explain
from hpcnn.errors import ConfigError

MANUAL = Manual(
    "Prints the manual of a command, as `hpcnn COMMAND --help` does, or writes those of all commands as pages for man.",
    examples=(
        ("hpcnn help train", "one command"),
        ("hpcnn help bench allreduce", "one of its parts"),
        ("hpcnn help --man share/man/man1", "pages for `man hpcnn-train`, in a folder of MANPATH (needs hpcnn[man])"),
    ),
    files=(("hpcnn*.1", "with --man: a page for hpcnn and for each command"),),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("help", help="print a command's manual, or write pages for man")
    explain(parser, MANUAL)
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="command, and its part (default: the overview)")
    parser.add_argument("--man", type=Path, metavar="FOLDER", help="write manual pages there (default: print)")


def run(args: argparse.Namespace) -> int:
    """Print the manual or write the pages."""
    if args.man is None:
        # Nothing but the help of the words is wanted, and argparse complains of those that are no commands.
        cli.make_parser(args.words[:1]).parse_args([*args.words, "--help"])
    elif cli.launched_rank() == 0:
        for path in write_pages(args.man):
            print(path)
    return 0


def write_pages(folder: Path) -> list[Path]:
    """Write a manual page of `hpcnn` and of each command and part, and return their paths.

    Raises
    ------
    ConfigError
        If argparse-manpage is not installed, or the folder cannot be written.
    """
    try:
        from argparse_manpage.manpage import Manpage
    except ImportError:
        raise ConfigError("help: --man needs argparse-manpage. `pip install 'hpcnn[man]'`.") from None
    overview, commands = cli.make_parser([]), cli.make_parser(list(cli.COMMANDS))
    about = {"version": __version__, "manual_title": "hpcnn manual", "project_name": "hpcnn"}
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for parser, what in [(overview, overview.description), *parsers(commands)]:
            manual = MANUALS.get(parser.prog)
            page = Manpage(parser, dict(about))
            page.description, page.prog = what, parser.prog.replace(" ", "-")
            for title, entries in manual.sections() if manual else ():
                page.add_section(title, ">", "\n".join(_entry(*entry) for entry in entries))
            parser.epilog = None if manual else parser.epilog  # it has become these sections
            paths.append(folder / f"{page.prog}.1")
            paths[-1].write_text(str(page))
    except OSError as error:
        raise ConfigError(f"help: cannot write pages to '{folder}': {error}. Name another folder.") from None
    return paths


def parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Yield the parsers of a parser's commands and of their parts, each with the line that lists it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for listed in action._choices_actions:
                below = action.choices[listed.dest]
                yield below, listed.help or ""
                yield from parsers(below)


def _entry(term: str, meaning: str) -> str:
    """Return a term and its meaning in the language of man."""
    term, meaning = (text.replace("\\", "\\\\").replace("-", "\\-") for text in (term, meaning))
    return f".TP\n\\fB{term}\\fR\n{meaning}"
