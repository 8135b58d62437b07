"""A folder of this user for compiled kernels and measurements: written atomically, and one writer at a time.

`HPCNN_CACHE_DIR` names it; left out it is `hpcnn` in `XDG_CACHE_HOME` or in `~/.cache`. Where that cannot be written
(a read-only home, a used-up quota) a folder of the user's in the system's temporary one takes its place.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "HPCNN_CACHE_DIR"
LOCK_TIMEOUT_S = 600.0
"""Longer than any kernel takes to compile; whoever waited this long does the work itself."""
POLL_S = 0.05


def folders() -> list[Path]:
    """Return the folders to look into, the preferred one first; they need not exist."""
    named = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    preferred = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "hpcnn"
    return [preferred, _spare()]


def read(name: str) -> bytes | None:
    """Return the contents of a file of the cache, or None where there is no such file."""
    for folder in folders():
        with suppress(OSError):
            if folder != _spare() or _is_mine(folder):
                return (folder / name).read_bytes()
    return None


def write(name: str, contents: bytes) -> Path | None:
    """Put a file into the cache at once and whole; return where it is, or None where no folder takes it."""
    for folder in folders():
        temporary = folder / f".{name}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            _make(folder)
            temporary.write_bytes(contents)
            os.replace(temporary, folder / name)
            return folder / name
        except OSError:  # the quota is used up, or the folder is read-only: the next one may do
            with suppress(OSError):
                temporary.unlink()
    return None


@contextmanager
def lock(name: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[bool]:
    """Hold the cache's lock of this name inside a `with` block; False is yielded where it could not be had in time.

    What the lock guards is right without it too, only done more than once: so nobody waits for ever, and a process
    that dies lets go. File systems without `flock` get a lock by a file that only one process can create.
    """
    held = None
    for folder in folders():
        try:
            _make(folder)
            held = _take(folder / f"{name}.lock", time.monotonic() + timeout_s)
            break
        except OSError:  # not a folder to write in
            continue
    try:
        yield held is not None
    finally:
        if isinstance(held, Path):
            held.unlink(missing_ok=True)
        elif held is not None:
            os.close(held)


def _take(path: Path, deadline: float) -> int | Path | None:
    """Return a locked descriptor, or the file that stands for the lock, or None after the deadline."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except (BlockingIOError, PermissionError):  # somebody has it; NFS says EACCES
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(POLL_S)
        except OSError:  # no flock on this file system
            os.close(descriptor)
            return _create(path.with_suffix(".owner"), deadline)


def _create(path: Path, deadline: float) -> Path | None:
    """Create the file that stands for a lock, and return it; None after the deadline."""
    while True:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return path
        except FileExistsError:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > LOCK_TIMEOUT_S:  # its owner died: nobody holds one so long
                    path.unlink()
                    continue
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)


def _spare() -> Path:
    return Path(tempfile.gettempdir()) / f"hpcnn-{os.getuid()}"


def _is_mine(folder: Path) -> bool:
    """Say whether only this user can write into a folder: nobody else is to put machine code there."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _make(folder: Path) -> None:
    """Make a folder if need be; raises OSError where that fails, or it is another user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder == _spare() and not _is_mine(folder):
        raise PermissionError(f"{folder} belongs to somebody else")
