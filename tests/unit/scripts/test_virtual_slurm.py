"""What the pretended cluster says when it cannot start; tests/slurm starts it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import virtual_slurm  # noqa: E402


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert virtual_slurm.why_not() == "its daemons need root (uid=1000). Use sudo -E."
    with pytest.raises(virtual_slurm.SlurmError, match="need root"), virtual_slurm.Slurm():
        pass


def test_programs_that_are_missing_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program, path=None: None if program in ("munged", "srun") else program)
    assert virtual_slurm.why_not() == (
        "munged, srun not found. Install the packages slurm-wlm and munge: `virtual_slurm.py install`."
    )


def test_elsewhere_than_on_debian_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path=None: None)
    with pytest.raises(virtual_slurm.SlurmError, match=r"needs root \(uid=\d+\) and apt-get"):
        virtual_slurm.install()


def test_ports_are_free_and_differ() -> None:
    assert len(set(virtual_slurm.free_ports(5))) == 5


def test_a_command_is_needed() -> None:
    command = [sys.executable, str(SCRIPTS / "virtual_slurm.py"), "run"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert "COMMAND" in done.stderr
