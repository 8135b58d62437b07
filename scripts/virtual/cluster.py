"""Hosts that are up: made, recorded, used and removed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from virtual import kernel
from virtual.kernel import NETNS, run
from virtual.launch import end, environment, find_launcher
from virtual.shape import NETWORK, TCP, ClusterError, Shape, address, control_groups

STATE = Path("/run/hpcnn-virtual-cluster")
NAME = "virtual_cluster"
# Where `ip` and `tc` lie, which a user's PATH may leave out.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
SELF = [sys.executable, "-EsS", str(Path(__file__).resolve().parents[1] / f"{NAME}.py")]


def why_not(shape: Shape | None = None) -> str | None:
    """Return why hosts like these cannot be made here, or None; makes nothing that outlasts the call."""
    shape = shape or Shape(1, rate="1gbit", cpu=0.5, memory="1G")
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only."
    if os.geteuid() != 0:
        return f"making hosts needs root (uid={os.geteuid()}). Use sudo -E, or a container started with --privileged."
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the command '{command}' is missing. Install the package iproute2."
    probe = subprocess.run([*SELF, "_probe", json.dumps(asdict(shape))], text=True, capture_output=True, check=False)
    if probe.returncode:
        return (probe.stderr.strip().splitlines() or ["the probe failed."])[-1].removeprefix(f"{NAME}: ")
    try:
        control_groups(shape.limits(), Path("/proc/mounts").read_text())
    except (ClusterError, OSError) as error:
        return str(error)
    return None


class Cluster:
    """Hosts on this machine; up between `with` and the end of its block, or from `up` to `down`.

    Parameters
    ----------
    num_hosts : int
        How many.
    rate : str, optional
        Of each link, in each direction: "100mbit", "1gbit". Left out: as fast as the machine.
    latency : str, optional
        Delay from host to host, "100us" for instance; needs netem in the kernel.
    cpu : float, optional
        Cores' worth of processor time for each host.
    memory : str, optional
        Of each host, "2G" for instance; what takes more is killed.
    name : str
        Clusters of different names do not see each other.

    Raises
    ------
    ClusterError
        If they cannot be made, or a cluster of this name is up.
    """

    def __init__(self, num_hosts: int, **shape: Any) -> None:
        self.shape = Shape(num_hosts, **shape)
        self.folder = STATE / self.shape.name
        self.groups: list[str] = []

    @classmethod
    def load(cls, name: str) -> Cluster:
        """Return the cluster of this name that is up."""
        state = read_state(name)
        if state is None:
            raise ClusterError(f"no cluster '{name}' is up. Make one with `{NAME}.py up N --name {name}`.")
        if is_leftover(state):
            raise ClusterError(
                f"the hosts of '{name}' are left over from a run that was killed."
                f" Remove them: `{NAME}.py down --name {name}`."
            )
        return cls.from_state(state)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Cluster:
        """Return the cluster, up or in pieces, that a record tells of."""
        cluster = cls(**state["shape"])
        cluster.groups = list(state["groups"])
        return cluster

    def __enter__(self) -> Cluster:
        self.up(keep=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, *, keep: bool = True) -> None:
        """Make the hosts; unless `keep`, they are this process's, and left over when it is gone."""
        reason = why_not(self.shape)
        if reason:
            raise ClusterError(reason)
        with locked():
            self._claim()
            try:
                self._make()
            except BaseException:
                self._remove()
                raise
            if keep:
                self._record(owner=None)

    def down(self) -> None:
        """Remove the hosts, and end what runs on them."""
        with locked():
            self._remove()

    def _claim(self) -> None:
        """Make sure that nothing has our names, and write down what is going to be made."""
        shape = self.shape
        state = read_state(shape.name)
        if state is not None and not is_leftover(state):
            raise ClusterError(
                f"a cluster '{shape.name}' is up already ({Shape(**state['shape']).describe()})."
                f" Take it down (`{NAME}.py down --name {shape.name}`), or give --name another."
            )
        if state is not None:
            print(f"{NAME}: removing the hosts '{shape.name}' that a killed run left", file=sys.stderr)
            Cluster.from_state(state)._remove()
        found = control_groups(shape.limits(), Path("/proc/mounts").read_text())
        folders = sorted({str(folder) for _, folder in found.values()})
        self.groups = [f"{folder}/{name}" for folder in folders for name in shape.namespaces[:-1]]
        for path in (*(NETNS / name for name in shape.namespaces), *map(Path, self.groups)):
            if path.exists():
                raise ClusterError(
                    f"{path} exists and no record says that it is ours. Remove it, or choose another --name."
                )
        self._record(owner=identity(os.getpid()))

    def _record(self, owner: Sequence[int] | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.folder / "state.new"
        draft.write_text(json.dumps({"shape": asdict(self.shape), "groups": self.groups, "owner": owner}))
        draft.replace(self.folder / "state.json")

    def _make(self) -> None:
        shape = self.shape
        *spaces, switch = shape.namespaces
        addresses = [f"{address(host)} {name}" for host, name in enumerate(shape.hostnames)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        (self.folder / "shm").mkdir()
        run(f"mount -t tmpfs -o mode=755 {NAME} {self.folder}/shm")
        run(f"ip netns add {switch}")
        run(f"ip -n {switch} link add switch type bridge")
        run(f"ip -n {switch} link set switch up addrgenmode none")
        for host, space in enumerate(spaces):
            (self.folder / "shm" / str(host)).mkdir()
            (self.folder / "shm" / str(host)).chmod(0o1777)
            run(f"ip netns add {space}")
            run(f"ip -n {space} link set lo up")
            run(f"ip -n {space} link add eth0 type veth peer name port{host} netns {switch}")
            run(f"ip -n {space} addr add {address(host)}/16 noprefixroute dev eth0")
            run(f"ip -n {switch} link set port{host} master switch")
            for namespace, device in ((space, "eth0"), (switch, f"port{host}")):
                self._shape_link(namespace, device)
                run(f"ip -n {namespace} link set {device} up addrgenmode none")
            run(f"ip -n {space} route replace {NETWORK} dev eth0 src {address(host)} congctl {TCP}")
        self._make_groups()

    def _shape_link(self, namespace: str, device: str) -> None:
        """Shape what one end of a link sends: with both ends shaped, both directions are."""
        if self.shape.rate is not None:
            segment = min(65_536, self.shape.bucket_bytes() // 2)
            with contextlib.suppress(
                ClusterError
            ):  # a kernel that cannot splits segments as it shapes: slower, no wrong
                run(f"ip -n {namespace} link set {device} gso_max_size {segment}")
        # The host's end delays and the switch's does not: a message from host to host is delayed once.
        for arguments in self.shape.shaping(delayed=device == "eth0"):
            run(f"tc -n {namespace} qdisc add dev {device} {arguments}")

    def _make_groups(self) -> None:
        found = control_groups(self.shape.limits(), Path("/proc/mounts").read_text())
        for group in map(Path, self.groups):
            group.mkdir()
            for controller, versions in self.shape.limits().items():
                kind, folder = found[controller]
                for file, text in versions[kind] if folder == group.parent else ():
                    if not file.endswith("?") or (group / file[:-1]).exists():
                        (group / file.rstrip("?")).write_text(text)

    def _remove(self) -> None:
        """Remove what the record tells of; some of it may be missing."""
        with kernel.undisturbed():
            problems: list[str] = []
            spaces = [name for name in self.shape.namespaces if (NETNS / name).exists()]
            for name in spaces:
                kernel.kill_all(name)
            commands = [f"ip netns del {name}" for name in spaces]
            if os.path.ismount(self.folder / "shm"):
                commands.append(f"umount -l {self.folder}/shm")
            for command in commands:
                try:
                    run(command)
                except ClusterError as error:
                    problems.append(str(error))
            for group in self.groups:
                try:
                    kernel.remove_group(Path(group))
                except OSError as error:
                    problems.append(f"{group}: {error.strerror}")
            if problems:
                raise ClusterError(f"not all could be removed: {'; '.join(problems)}. Try `{NAME}.py down` again.")
            shutil.rmtree(self.folder, ignore_errors=True)

    def mpirun(
        self,
        command: Sequence[str],
        *,
        hosts: int | None = None,
        ppn: int = 1,
        mpi: str = "auto",
        env: Mapping[str, str] | None = None,
        limit_s: float | None = None,
        **options: Any,
    ) -> int:
        """Run an MPI program and return its exit status.

        Parameters
        ----------
        command : sequence of str
            The program and its arguments.
        hosts : int, optional
            How many take part; left out, all.
        ppn : int
            Ranks on each host.
        mpi : str
            "mpich", "openmpi", or "auto": whichever library the mpiexec on PATH belongs to.
        env : mapping, optional
            Added to the environment.
        limit_s : float, optional
            Seconds after which it is ended and ClusterError raised.
        **options
            As of `subprocess.Popen`.
        """
        names = self._first(hosts)
        library, launcher = find_launcher(mpi)
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder:
            agent = Path(folder) / "agent"
            agent.write_text(f'#!/bin/sh\nexec {shlex.join([*SELF, "_ssh", self.shape.name])} "$@"\n')
            agent.chmod(0o700)
            count = ["-n", str(len(names) * ppn)]
            places = ",".join(f"{name}:{ppn}" for name in names)
            if library == "mpich":
                how = ["-launcher", "ssh", "-launcher-exec", str(agent), "-hosts", places, "-ppn", str(ppn)]
            else:
                remote = ["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(agent)]
                how = [*remote, "--host", places, "--map-by", f"ppr:{ppn}:node", "--bind-to", "none"]
                how += [part for name in env or {} for part in ("-x", name)]
            whole = environment(self.shape.cpu, ppn, env)
            process = self.popen(0, [launcher, *how, *count, *command], env=whole, **options)
            return self._wait([process], limit_s)

    def each(
        self,
        command: Sequence[str],
        *,
        hosts: int | None = None,
        env: Mapping[str, str] | None = None,
        port: int = 29500,
        limit_s: float | None = None,
        **options: Any,
    ) -> int:
        """Run a program once on every host, at once, and return the first exit status that is not 0.

        Each finds its place in RANK, WORLD_SIZE and their like, which torch.distributed reads. When one fails, the
        others are ended.

        Parameters
        ----------
        command : sequence of str
            The program and its arguments.
        hosts : int, optional
            How many take part; left out, all.
        env : mapping, optional
            Added to the environment.
        port : int
            MASTER_PORT.
        limit_s : float, optional
            Seconds after which all are ended and ClusterError raised.
        **options
            As of `subprocess.Popen`.
        """
        names = self._first(hosts)
        processes = []
        try:
            for rank in range(len(names)):
                place = {"RANK": rank, "NODE_RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
                place |= {"WORLD_SIZE": len(names), "MASTER_ADDR": address(0), "MASTER_PORT": port}
                whole = {key: str(value) for key, value in place.items()} | dict(env or {})
                processes.append(self.popen(rank, command, env=environment(self.shape.cpu, 1, whole), **options))
        except BaseException:
            end(processes)
            raise
        return self._wait(processes, limit_s)

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a program on one host; options as of `subprocess.Popen`."""
        return subprocess.Popen([*SELF, "_enter", self.shape.name, str(host), *command], **options)

    def enter(self, host: int) -> None:
        """Move this process onto a host."""
        namespace = self.shape.namespaces[host]
        groups = [Path(group) for group in self.groups if group.endswith(f"/{namespace}")]
        kernel.enter(namespace, self.shape.hostnames[host], self.folder, host, groups)

    def traffic(self, host: int) -> tuple[int, int]:
        """Return the bytes that a host has sent and received, headers included."""
        text = run(f"ip -j -s -n {self.shape.namespaces[host]} link show eth0")
        counts = json.loads(text)[0]["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]

    def killed(self) -> list[int]:
        """Return for each host how many processes were killed for want of memory."""
        counts = [0] * self.shape.num_hosts
        for group in map(Path, self.groups):
            for file in ("memory.oom_control", "memory.events"):
                if (group / file).exists():
                    match = re.search(r"^oom_kill (\d+)$", (group / file).read_text(), re.MULTILINE)
                    counts[self.shape.namespaces.index(group.name)] += int(match[1]) if match else 0
        return counts

    def _first(self, hosts: int | None) -> list[str]:
        names = self.shape.hostnames
        if hosts is not None and not 1 <= hosts <= len(names):
            raise ClusterError(f"cannot use {hosts} hosts: there are {len(names)}. Take them down, then `up {hosts}`.")
        return names[:hosts]

    def _wait(self, processes: list[subprocess.Popen], limit_s: float | None) -> int:
        """Wait for all, or until one fails; end what then still runs."""
        before = self.killed()
        give_up = time.monotonic() + (limit_s or float("inf"))
        try:
            while not any(process.poll() for process in processes):
                if all(process.returncode is not None for process in processes):
                    return 0
                if time.monotonic() > give_up:
                    raise ClusterError(f"no end after {limit_s:g} s; the program was ended.")
                time.sleep(0.02)
            failed = next(process.returncode for process in processes if process.returncode)
        finally:
            end(processes)
        for name, old, new in zip(self.shape.hostnames, before, self.killed()):
            if new > old:
                print(f"{NAME}: {name} ran out of memory ({self.shape.memory}); a process was killed", file=sys.stderr)
        return failed if failed > 0 else 128 - failed


def identity(pid: int) -> list[int] | None:
    """Return a number pair that no other process ever has, or None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [pid, int(fields[19])]  # the time at which it started


def read_state(name: str) -> dict[str, Any] | None:
    """Return the record of the cluster of this name; None if there is none."""
    try:
        state: dict[str, Any] = json.loads((STATE / name / "state.json").read_text())
    except FileNotFoundError:
        return None
    return state


def is_leftover(state: Mapping[str, Any]) -> bool:
    """Return whether the process that these hosts were made for is gone."""
    return state["owner"] is not None and identity(state["owner"][0]) != state["owner"]


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Let one process at a time make or remove hosts."""
    STATE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
