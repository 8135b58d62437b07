"""The text that turns a parser's help into a manual page: one declaration a command, for `--help`, `hpcnn help`, man.

A command's module calls `explain(parser, MANUAL)`; options and their groups stay where argparse has them.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

EXIT_CODES = ((0, "done"), (1, "failed"), (2, "wrong usage or configuration"))


class Manual(NamedTuple):
    """What there is to say of a command besides its options.

    Attributes
    ----------
    description : str
        One paragraph; line breaks do not matter.
    examples : sequence of (str, str)
        Command lines that work, and what for.
    files : sequence of (str, str)
        What is written, and what is in it.
    exit_codes : sequence of (int, str)
    see_also : sequence of str
        Commands, or documents.
    """

    description: str
    examples: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]] = ()
    exit_codes: Sequence[tuple[int, str]] = EXIT_CODES
    see_also: Sequence[str] = ()

    def sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return the sections behind the options, each of terms and what they mean; empty ones are left out."""
        found = [
            ("examples", list(self.examples)),
            ("files written", list(self.files)),
            ("exit codes", [(str(code), meaning) for code, meaning in self.exit_codes]),
            ("see also", [(", ".join(self.see_also), "")] if self.see_also else []),
        ]
        return [(title, entries) for title, entries in found if entries]


MANUALS: dict[str, Manual] = {}
"""By command ("hpcnn data import"), those of the parsers that were made."""


def explain(parser: argparse.ArgumentParser, manual: Manual) -> None:
    """Give a parser the description, and the sections behind its options."""
    MANUALS[parser.prog] = manual
    parser.description = " ".join(manual.description.split())
    parser.epilog = "\n\n".join(f"{title}:\n{_entries(entries)}" for title, entries in manual.sections())
    parser.formatter_class = Formatter


def _entries(entries: Sequence[tuple[str, str]]) -> str:
    """Return terms with their meanings beside them, or below where terms are long."""
    width = max(len(term) for term, _ in entries)
    if width > 22:
        return "\n".join(f"  {term}\n      {meaning}" if meaning else f"  {term}" for term, meaning in entries)
    return "\n".join(f"  {term.ljust(width)}  {meaning}".rstrip() for term, meaning in entries)


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves indented lines where they are."""

    def __init__(self, prog: str, **kwargs: object) -> None:
        super().__init__(prog, max_help_position=30, **kwargs)  # type: ignore[arg-type]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_filled(line, width, indent) for line in text.splitlines())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _filled(" ".join(text.split()), width, "").splitlines()


def _filled(line: str, width: int, indent: str) -> str:
    """Return a line in several of at most `width`, the later ones further in if it is; --options stay whole."""
    own = " " * (len(line) - len(line.lstrip()))
    further = own + "    " * bool(own)
    first, rest = indent + own, indent + further
    wrapper = textwrap.TextWrapper(
        width=width - 2, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
    lines = wrapper.wrap(line.strip())
    is_command = own == "  " and " hpcnn " in f" {line}" and "  " not in line.strip()
    return (" \\\n" if is_command else "\n").join(lines)  # a command may be copied with its line breaks
