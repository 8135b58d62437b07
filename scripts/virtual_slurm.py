#!/usr/bin/env python3
"""A Slurm of two small nodes on this machine, to try job scripts with real sbatch, srun and scancel.

munged, slurmctld and one slurmd a node run on loopback, on free ports, in a folder of their own. A Slurm or munge that
is here already is left alone, and nothing stays behind but Debian's packages. The nodes have as many cores and GPUs
as you say: they only count them. Needs Linux, root, Python 3.11, and Debian or Ubuntu if Slurm is to be installed.

    virtual_slurm.py install                                   Debian's slurm-wlm and munge, where they are missing
    virtual_slurm.py check                                     whether it can start here, and if not, why
    virtual_slurm.py run -- sbatch --wait slurm/cpu.sbatch     start it, run a command with it, stop it
    virtual_slurm.py run --gpus 4 -- bash                      ... a shell, with four pretended GPUs on each node

In Python: `with Slurm() as slurm: subprocess.run(["srun", "-N2", "hostname"], env=slurm.environment())`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NAME = "virtual_slurm"
NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue")
START_S, STOP_S = 30.0, 10.0
# Where daemons lie, which a user's PATH may leave out.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
# A job that is queued again waits until its old credential has expired.
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
# MPICH names shared memory after the job: no number that an earlier job, which may have been killed, has used.
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
KillWait=5
ReturnToService=2
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Jobs of `main` push those of `preemptible` off their nodes, half a minute after a TERM.
PartitionName=main Nodes=ALL Default=YES PriorityTier=2 State=UP
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=30 State=UP
"""


class SlurmError(Exception):
    """What keeps Slurm from starting here, and what to do."""


def missing() -> list[str]:
    """Return the programs that are not here."""
    return [program for program in (*DAEMONS, *COMMANDS) if shutil.which(program, path=PATH) is None]


def why_not() -> str | None:
    """Return why Slurm cannot be started here, or None; starts nothing."""
    if os.geteuid() != 0:
        return f"its daemons need root (uid={os.geteuid()}). Use sudo -E."
    absent = missing()
    if absent:
        return f"{', '.join(absent)} not found. Install the packages {' and '.join(PACKAGES)}: `{NAME}.py install`."
    return None


def install() -> None:
    """Install Debian's packages where they are missing; their services are not started."""
    if not missing():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SlurmError(f"installing {' and '.join(PACKAGES)} needs root (uid={os.geteuid()}) and apt-get.")
    # invoke-rc.d asks this program whether it may start a service; where there is one already, it is believed.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            command = ["apt-get", "-qq", *words]
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise SlurmError(f"`{' '.join(command)}` failed: {last}")
    finally:
        if ours:
            policy.unlink()


class Slurm:
    """The daemons; running between `with` and the end of its block.

    Parameters
    ----------
    cpus, gpus : int
        What each of the two nodes claims to have. Nothing is bound or limited.

    Attributes
    ----------
    folder : Path
        Configuration, logs and state; removed at the end.

    Raises
    ------
    SlurmError
        If Slurm cannot be started here.
    """

    def __init__(self, *, cpus: int = 64, gpus: int = 4) -> None:
        self.cpus, self.gpus = cpus, gpus
        self.folder = Path()
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Slurm:
        reason = why_not()
        if reason:
            raise SlurmError(reason)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return this environment, such that Slurm's commands and those they start find this Slurm."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment(), text=True, capture_output=True, timeout=START_S, check=False
        )
        if done.returncode:
            raise SlurmError(f"`{' '.join(command)}`: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """End all jobs, then the daemons, and remove the folder; also after half a start."""
        with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
            if self._daemons and all(daemon.poll() is None for _, daemon in self._daemons):
                self.ask("scancel", "--quiet", "--state=PENDING", "--user=root")
                self.ask("scancel", "--quiet", "--user=root")
                until(lambda: not self.ask("squeue", "--noheader"), STOP_S)
        for _, daemon in reversed(self._daemons):
            end(daemon)
        self._daemons = []
        # Steps are no children of the daemons: slurmstepd, launchers and ranks know this Slurm by its configuration.
        until(lambda: not list(self._left(signal.SIGTERM)), STOP_S)
        for _ in self._left(signal.SIGKILL):
            pass
        if self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self, number: signal.Signals) -> Iterator[int]:
        """Yield the processes of jobs that still run, and send each a signal."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        os.kill(int(entry.name), number)
                        yield int(entry.name)

    def _start(self) -> None:
        folder = self.folder
        self._configure()
        socket_path = folder / "munge" / "socket"
        files = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", f"--socket={socket_path}", *files)
        self._wait(socket_path.exists)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.ask("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))])

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o600)
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=4096"
            f" Gres=gpu:{self.gpus}"
            for node, port in zip(NODES, ports[1:])
        ]
        first_job = 1_000_000 + random.randrange(60_000_000)
        text = CONFIGURATION.format(folder=folder, host=host, ports=ports, nodes="\n".join(nodes), first_job=first_job)
        (folder / "slurm.conf").write_text(text)
        # A GPU is a file of this name here: it is handed out, and nobody opens it.
        for gpu in range(self.gpus):
            (folder / f"gpu{gpu}").symlink_to(os.devnull)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{self.gpus - 1}]\n" if self.gpus else "")

    def _daemon(self, program: str, *arguments: str) -> None:
        """Start a daemon in the foreground; it ends with this process, however that ends."""
        with (self.folder / f"{program}-{len(self._daemons)}.log").open("wb") as log:
            daemon = subprocess.Popen(
                [program, *arguments],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the command; the daemons are stopped behind it
                preexec_fn=_end_with_parent,
            )
        self._daemons.append((log.name, daemon))

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`, as long as all daemons run."""

        def look() -> bool:
            for log, daemon in self._daemons:
                if daemon.poll() is not None:
                    raise SlurmError(f"{daemon.args[0]} ended with {daemon.returncode}:\n{tail(log)}")
            with contextlib.suppress(SlurmError):
                return ready()
            return False

        if not until(look, START_S):
            logs = "\n".join(tail(log) for log, _ in self._daemons)
            raise SlurmError(f"the nodes were not ready after {START_S:g} s:\n{logs}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def until(done: Callable[[], bool], limit_s: float) -> bool:
    """Return whether `done()` became true in time."""
    give_up = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True


def end(process: subprocess.Popen) -> None:
    """End a process, gently at first."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: str) -> str:
    """Return the last lines of a log."""
    return "\n".join(Path(log).read_text(errors="replace").splitlines()[-5:])


def free_ports(count: int) -> list[int]:
    """Return ports of loopback on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run(command: Sequence[str], **shape: int) -> int:
    """Start Slurm, run a command with it, stop it, and return the command's exit status."""
    with Slurm(**shape) as slurm:
        environment = slurm.environment()
        if shutil.which(command[0], path=environment["PATH"]) is None:
            raise SlurmError(f"no command '{command[0]}' on PATH.")
        process = subprocess.Popen(command, env=environment)
        try:
            status = process.wait()
        finally:
            end(process)
        return status if status >= 0 else 128 - status


def main() -> int:
    """Run the command line; errors are one line."""
    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("install")
    verbs.add_parser("check")
    options = verbs.add_parser("run")
    options.add_argument("--cpus", type=int, default=64, help="of each node (64)")
    options.add_argument("--gpus", type=int, default=4, help="of each node (4)")
    options.add_argument("command", nargs="+", metavar="-- COMMAND")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if args.verb == "install":
            install()
        elif args.verb == "check":
            reason = why_not()
            print(reason or "Slurm can be started here")
            return 1 if reason else 0
        else:
            return run(args.command, cpus=args.cpus, gpus=args.gpus)
    except SlurmError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
