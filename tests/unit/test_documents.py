"""What the documents tell people to type must work: commands parse, configurations load, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hpcnn import configuration
from hpcnn.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "kernels").glob("*.md"),
        *(ROOT / "slurm").glob("*.md"),
    ]
)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the words behind `hpcnn` of every command in bash blocks and inline code."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:mpi\w+ -n \d+ )?hpcnn [a-z]+ [^`]*)`", text)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "hpcnn" in words:
            found.append(words[words.index("hpcnn") + 1 :])
    return found


def test_documents_are_found_and_hold_commands() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "numerics.md"} <= {path.name for path in DOCUMENTS}
    assert len(commands((ROOT / "README.md").read_text())) > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_is_one(path: Path) -> None:
    for words in commands(path.read_text()):
        cli.make_parser(words[:1]).parse_args(words)


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    (words,) = commands("```bash\nmpiexec -n 2 hpcnn train lenet5 --no-such-flag  # remark\n```\n")
    with pytest.raises(SystemExit):
        cli.make_parser(words[:1]).parse_args(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_configuration_in_a_document_loads(path: Path) -> None:
    for text in blocks(path.read_text(), "toml"):
        configuration.from_toml(text, path.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [] == [link for link in links if not (path.parent / link).exists()]


def test_every_source_file_that_the_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text() + (ROOT / "docs" / "papers.md").read_text()
    names = set(re.findall(r"`([a-z_0-9]+/[a-z_0-9/]+\.py)`", text))
    assert len(names) > 15
    assert [] == sorted(name for name in names if not (ROOT / "hpcnn" / name).exists() and not (ROOT / name).exists())
