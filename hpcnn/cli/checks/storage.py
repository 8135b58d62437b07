"""Whether folders can be written, have room, and lie where their use is not slow."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts
from hpcnn.cli.table import quantity

NETWORK = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "panfs", "pvfs2", "orangefs", "wekafs",
    "9p", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs", "dvs", "vastnfs",
}  # fmt: skip
"""Types of file systems that other machines keep."""

LEAST_RUN_BYTES, LEAST_CACHE_BYTES, LEAST_SHM_BYTES = 2 << 30, 100 << 20, 128 << 20
"""Room for a few checkpoints of VGG-16 with momentum; for compiled kernels; a container starts with 64 MiB."""

LEAST_FILES = 1000
SLOW_WRITE_S = 0.2
PROBE = ".hpcnn-doctor-"
LOCKING = "HDF5_USE_FILE_LOCKING"


class Mount(NamedTuple):
    """Where a file system is seen, and of which type it is."""

    point: Path
    kind: str
    source: str


def mount_of(path: Path, mounts: str) -> Mount:
    """Return the mount that holds an absolute path, from a text such as /proc/mounts; of equal ones the last."""
    best = Mount(Path("/"), "unknown", "")
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        source, point = (field.replace("\\040", " ").replace("\\011", "\t") for field in fields[:2])
        one = Mount(Path(point), fields[2], source)
        if path.is_relative_to(one.point) and len(one.point.parts) >= len(best.point.parts):
            best = one
    return best


def facts(folders: Mapping[str, Path], mounts: Path = Path("/proc/mounts")) -> Facts:
    """Return what there is to know of each folder, or where it does not exist of the one it would be made in."""
    try:
        text = mounts.read_text()
    except OSError:
        text = ""  # not Linux
    return {name: probe(path, text) for name, path in folders.items()}


def probe(path: Path, mounts: str) -> Facts:
    """Return a folder's file system, room, and what a small write and a lock in it come to; leaves nothing behind."""
    where = path.absolute()
    while not where.exists() and where != where.parent:
        where = where.parent
    mount = mount_of(where.resolve(), mounts)
    found: Facts = {"path": str(path.absolute()), "type": mount.kind, "network": mount.kind in NETWORK}
    try:
        room = os.statvfs(where)
        found |= {"free_bytes": room.f_bavail * room.f_frsize, "free_files": room.f_favail if room.f_files else None}
        begin = time.perf_counter()
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=where) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
            found["write_s"] = round(time.perf_counter() - begin, 6)
            found["locks"] = _lockable(file.fileno())
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def _lockable(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)  # others hold it: there are locks
    return True


def hdf5_error(folder: Path) -> str | None:
    """Return why an HDF5 file cannot be made in a folder as checkpoints are, None if it can."""
    import h5py

    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=folder) as place:
            with h5py.File(Path(place) / "probe.h5", "w", locking=False) as file:
                file["x"] = [1.0]
            with h5py.File(Path(place) / "probe.h5", "r", locking=False) as file:
                return None if file["x"][0] == 1.0 else "what was written is not what was read"
    except (OSError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]


def judge(storage: Facts, *, chosen: bool, with_gpu: bool, environment: Mapping[str, str]) -> list[Problem]:
    """Return what is wrong with the folders.

    Parameters
    ----------
    storage : dict
        As `facts` returns it, for "run folder", "cache" and "shared memory", each of which may be missing.
    chosen : bool
        Whether the user named the run folder: if not, another one may do.
    with_gpu : bool
        Whether there is a GPU, for which kernels are compiled into the cache.
    environment : mapping
        The variables of this process.
    """
    found = []
    if run := storage.get("run folder"):
        found += _judge_folder("run folder", run, LEAST_RUN_BYTES, "Name another one with --out", essential=chosen)
        if why := run.get("hdf5_error"):
            forced = environment.get(LOCKING, "").upper() in ("TRUE", "1", "BEST_EFFORT")
            fix = f"`unset {LOCKING}`." if forced else f"`export {LOCKING}=FALSE`, or name another folder with --out."
            found.append(Problem(f"HDF5 files cannot be written in {run['path']}: {why}", fix, essential=chosen))
    if cache := storage.get("cache"):
        elsewhere = "`export HPCNN_CACHE_DIR` to a folder of the node's own disk"
        if with_gpu:
            found += _judge_folder("cache", cache, LEAST_CACHE_BYTES, elsewhere, essential=False)
        if with_gpu and cache["network"]:
            what = f"compiled kernels are kept on {cache['type']} ({cache['path']}), where every rank reads them"
            found.append(advice(what, f"{elsewhere} if starting is slow."))
    shared = storage.get("shared memory")
    return found + (shared_memory(shared) if shared else [])


def shared_memory(shm: Facts, host: str = "") -> list[Problem]:
    """Return whether the memory through which ranks of a node exchange messages is too small."""
    if shm.get("free_bytes", LEAST_SHM_BYTES) >= LEAST_SHM_BYTES and "error" not in shm:
        return []
    state = shm.get("error") or f"{quantity(shm['free_bytes'], 'B')} free"
    what = f"{host and f'{host}: '}shared memory in {shm['path']}: {state}; ranks of a node exchange messages there"
    return [
        advice(what, "In a container: `docker run --shm-size=1g` or `--ipc=host`; else delete what jobs left there.")
    ]


def _judge_folder(name: str, folder: Facts, least: int, fix: str, *, essential: bool) -> list[Problem]:
    path = folder["path"]
    if why := folder.get("error"):
        return [Problem(f"{name} {path} cannot be written: {why}", f"{fix}, or mend its permissions.", essential)]
    found = []
    if folder["free_bytes"] < least:
        found.append(advice(f"{name} {path}: {quantity(folder['free_bytes'], 'B')} free", f"Make room. {fix}."))
    if folder["free_files"] is not None and folder["free_files"] < LEAST_FILES:
        found.append(advice(f"{name} {path}: room for {folder['free_files']} more files", f"Delete some. {fix}."))
    if folder["write_s"] > SLOW_WRITE_S:
        what = f"{name} {path} ({folder['type']}): 4 kB took {folder['write_s']:.2f} s to write"
        found.append(advice(what, f"{fix} if that stays so."))
    return found
