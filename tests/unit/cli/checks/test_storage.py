"""Folders: which file system, what is judged too small, too slow or not writable."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hpcnn.cli.checks import storage

MOUNTS = """
/dev/sda1 / ext4 rw 0 0
server:/export/home /home nfs4 rw,vers=4.2 0 0
10.0.0.1@o2ib:/fs /scratch lustre rw,flock 0 0
/dev/sdb /scratch/local\\040disk xfs rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
old /mnt/twice ext4 rw 0 0
new /mnt/twice beegfs rw 0 0
broken line
"""
FINE = {
    "path": "/x", "type": "ext4", "network": False, "free_bytes": 10 << 30, "free_files": 10**6, "write_s": 1e-3,
    "locks": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs", "nfs4"),
        ("/homes/me", "ext4"),
        ("/scratch/me", "lustre"),
        ("/scratch/local disk/me", "xfs"),
        ("/mnt/twice/x", "beegfs"),
    ],
)
def test_mount_is_the_longest_one_above_a_path(path: str, kind: str) -> None:
    mount = storage.mount_of(Path(path), MOUNTS)
    assert mount.kind == kind
    assert (kind in storage.NETWORK) == (kind in ("nfs4", "lustre", "beegfs"))


def test_unknown_mounts_are_no_reason_to_fail() -> None:
    assert storage.mount_of(Path("/x"), "").kind == "unknown"


def judge(change: dict, name: str = "run folder", *, chosen: bool = False, gpu: bool = True, **variables: str) -> list:
    return storage.judge({name: FINE | change}, chosen=chosen, with_gpu=gpu, environment=variables)


def test_probe_of_a_folder_to_be_made_looks_at_the_one_above_and_leaves_nothing(tmp_path: Path) -> None:
    found = storage.probe(tmp_path / "runs" / "a", "")
    assert found["path"] == str(tmp_path / "runs" / "a")
    assert found["free_bytes"] > 0
    assert 0 < found["write_s"] < 30
    assert list(tmp_path.iterdir()) == []
    assert storage.hdf5_error(tmp_path / "runs") is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_essential_only_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = storage.probe(tmp_path / "file", "")
    assert found["error"]
    for chosen in (True, False):
        (problem,) = judge({"error": found["error"]}, chosen=chosen)
        assert problem.essential == chosen
        assert "cannot be written" in problem.what
        assert "--out" in problem.fix
    assert storage.hdf5_error(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "change", "what", "fix"),
    [
        ("run folder", {"free_bytes": 5 << 20}, "5.24 MB free", "--out"),
        ("run folder", {"free_files": 3}, "room for 3 more files", "Delete"),
        ("run folder", {"write_s": 1.5}, "took 1.50 s to write", "--out"),
        ("cache", {"free_bytes": 5 << 20}, "cache /x: 5.24 MB free", "HPCNN_CACHE_DIR"),
        ("cache", {"type": "nfs4", "network": True}, "kept on nfs4 (/x)", "HPCNN_CACHE_DIR"),
        ("shared memory", {"free_bytes": 64 << 20}, "67.1 MB free", "--shm-size"),
    ],
)
def test_judgement_of_a_folder(name: str, change: dict, what: str, fix: str) -> None:
    assert judge({}, name) == []
    (problem,) = judge(change, name)
    assert what in problem.what
    assert fix in problem.fix
    assert not problem.essential


def test_cache_matters_only_where_there_is_a_gpu() -> None:
    assert judge({"network": True, "free_bytes": 0, "write_s": 9.0}, "cache", gpu=False) == []


@pytest.mark.parametrize(
    ("variables", "fix"), [({}, "LOCKING=FALSE"), ({"HDF5_USE_FILE_LOCKING": "TRUE"}, "`unset HDF5_USE_FILE_LOCKING`")]
)
def test_hdf5_that_cannot_lock_is_told_how_not_to(variables: dict[str, str], fix: str) -> None:
    (problem,) = judge({"hdf5_error": "unable to lock file, errno = 38"}, chosen=True, **variables)
    assert problem.essential
    assert "unable to lock file" in problem.what
    assert fix in problem.fix


def test_locks_that_others_hold_are_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, expected in ((errno.EAGAIN, True), (errno.ENOSYS, False), (errno.ENOLCK, False)):

        def refuse(descriptor: int, operation: int, number: int = number) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(storage.fcntl, "flock", refuse)
        assert storage._lockable(0) == expected
