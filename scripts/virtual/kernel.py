"""Namespaces, mounts, control groups and processes: what virtual hosts are made of."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from virtual.shape import ClusterError, Shape

NETNS = Path("/run/netns")
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x40000000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
GRACE_S = 3.0


def run(command: str) -> str:
    """Run a command given as words and return what it prints."""
    result = subprocess.run(command.split(), text=True, capture_output=True, check=False)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise ClusterError(f"`{command}` failed: {reason}")
    return result.stdout


def libc(function: str, *arguments: Any) -> None:
    """Call a function of the C library; OSError if it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: str, kind: bytes | None, flags: int) -> None:
    """Mount a file system in this process's mount namespace."""
    libc("mount", source.encode(), target.encode(), kind, ctypes.c_ulong(flags), None)


def enter(namespace: str, hostname: str, folder: Path, host: int, groups: Sequence[Path]) -> None:
    """Move this process onto a host.

    Parameters
    ----------
    namespace, hostname : str
        Of the host.
    folder : Path
        Where its cluster keeps the file of host names and what is under /dev/shm.
    host : int
        Which host it is.
    groups : sequence of Path
        The host's control groups.
    """
    try:
        with (NETNS / namespace).open() as file:
            libc("setns", file.fileno(), CLONE_NEWNET)
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))
    except FileNotFoundError as error:
        raise ClusterError(f"the host {hostname} is gone: {error.filename} is missing.") from None
    libc("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    socket.sethostname(hostname)
    mount("none", "/", None, MS_REC | MS_SLAVE)
    mount(f"{folder}/shm/{host}", "/dev/shm", None, MS_BIND)
    mount(f"{folder}/hosts", "/etc/hosts", None, MS_BIND)
    # Libraries look for network devices under /sys, which shows those of the namespace in which it was mounted.
    control = os.open("/sys/fs/cgroup", os.O_PATH)
    mount("sysfs", "/sys", b"sysfs", 0)
    mount(f"/proc/self/fd/{control}", "/sys/fs/cgroup", None, MS_BIND | MS_REC)
    os.close(control)


def execute(command: Sequence[str]) -> None:
    """Become another program."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ClusterError(f"cannot run '{command[0]}': {error.strerror}.") from None


def probe(shape: Shape) -> None:
    """Make a link in a namespace that ends with this process, and shape it."""
    try:
        libc("unshare", CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    except OSError as error:
        reason = error.strerror
        raise ClusterError(
            f"no namespaces may be made here ({reason}). Start the container with --privileged."
        ) from None
    for kind in ("probe0 type bridge", "probe1 type veth peer name probe2"):
        run(f"ip link add {kind}")
    for arguments in shape.shaping():
        try:
            run(f"tc qdisc add dev probe1 {arguments}")
        except ClusterError:
            kind = "netem" if "netem" in arguments else "tbf"
            option = "--latency" if kind == "netem" else "--rate"
            raise ClusterError(f"this kernel lacks '{kind}'. `modprobe sch_{kind}`, or leave out {option}.") from None


def kill(pids: Sequence[str]) -> None:
    """Kill processes by their ids."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def kill_all(namespace: str) -> None:
    """Kill the processes of a network namespace and wait until they are gone, a while at most."""
    give_up = time.monotonic() + GRACE_S
    while (pids := run(f"ip netns pids {namespace}").split()) and time.monotonic() < give_up:
        kill(pids)
        time.sleep(0.01)


def remove_group(group: Path) -> None:
    """Remove a control group once the last of its processes has left."""
    give_up = time.monotonic() + GRACE_S
    while group.exists():
        kill((group / "cgroup.procs").read_text().split())
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put signals off until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
