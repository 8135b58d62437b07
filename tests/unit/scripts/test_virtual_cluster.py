"""Hosts in namespaces, measured from outside: what the links carry, what the limits hold, what is left afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from virtual import cluster as cluster_module  # noqa: E402
from virtual.launch import environment, find_launcher  # noqa: E402
from virtual.shape import control_groups, parse  # noqa: E402
from virtual_cluster import Cluster, ClusterError, Shape, why_not  # noqa: E402

SCRIPT = [sys.executable, str(SCRIPTS / "virtual_cluster.py")]
# Nobody else's: another run of these tests may be at work on the same machine.
NAME = f"t{os.getpid()}"
RATE_MBIT, CPU, MEMORY_MB = 100, 0.3, 512


def script(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *arguments], text=True, capture_output=True, timeout=60, check=False, **options)


# What needs no privileges.


def test_rates_and_sizes_are_read_with_their_units() -> None:
    assert [1e9, 2.5e6] == [parse("rate", text, {"mbit": 1e6, "gbit": 1e9}) for text in ("1gbit", "2.5mbit")]
    for text in ("1", "1gb", "-1gbit", "0gbit", "1 gbit", ""):
        with pytest.raises(ClusterError, match=r"rate .* must be a positive number and mbit or gbit, '1gbit'"):
            parse("rate", text, {"mbit": 1e6, "gbit": 1e9})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_hosts": 0}, "number of hosts"),
        ({"num_hosts": 251}, "must be 1 to 250"),
        ({"num_hosts": 2, "name": "../x"}, "lower-case letters and digits"),
        ({"num_hosts": 2, "cpu": 0.01}, "at least 0.05 cores"),
        ({"num_hosts": 2, "memory": "2"}, "memory"),
        ({"num_hosts": 2, "latency": "1s"}, "us or ms"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Shape(**wrong)


def test_a_link_may_send_a_millisecond_at_once_and_a_delay_follows_the_rate() -> None:
    rate, delay = Shape(2, rate="1gbit", latency="50us").shaping()
    assert rate == "root handle 1: tbf rate 1000000000bit burst 125000 latency 200ms"
    assert delay.startswith("parent 1: handle 2: netem delay 50us")
    assert [rate] == Shape(2, rate="1gbit", latency="50us").shaping(delayed=False)
    assert Shape(2, latency="1ms").shaping()[0].startswith("root handle 2: netem delay 1000us")


def test_limits_are_written_for_both_versions_of_control_groups() -> None:
    limits = Shape(2, cpu=0.45, memory="2G").limits()
    assert [("cpu.max", "9000 20000")] == limits["cpu"]["cgroup2"]
    assert [("cpu.cfs_period_us", "20000"), ("cpu.cfs_quota_us", "9000")] == limits["cpu"]["cgroup"]
    assert ("memory.max", str(2**31)) in limits["memory"]["cgroup2"]
    assert ("memory.limit_in_bytes", str(2**31)) in limits["memory"]["cgroup"]
    assert {} == Shape(2, rate="1gbit").limits()


def test_control_groups_are_found_in_the_first_version_the_second_and_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    second = f"cgroup2 {tmp_path} cgroup2 rw,nosuid 0 0\n"
    first = f"cgroup {tmp_path}/c cgroup rw,cpu,cpuacct 0 0\n"
    (tmp_path / "c").mkdir()
    limits = Shape(1, cpu=1, memory="1G").limits()
    other = "proc /proc proc rw 0 0\n"
    assert {"cpu": ("cgroup2", tmp_path), "memory": ("cgroup2", tmp_path)} == control_groups(limits, other + second)
    assert {"cpu": ("cgroup", tmp_path / "c"), "memory": ("cgroup2", tmp_path)} == control_groups(
        limits, first + second
    )
    with pytest.raises(ClusterError, match="no control group here can limit memory"):
        control_groups(limits, first)


def test_controllers_that_are_not_delegated_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    with pytest.raises(ClusterError, match=r"'cpu' is not delegated .* `echo \+cpu > .*/cgroup.subtree_control`"):
        control_groups(Shape(1, cpu=1).limits(), f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")


def test_a_rank_starts_no_more_threads_than_its_host_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ["1", "2", "1"] == [
        environment(cpu, ppn, None)["OMP_NUM_THREADS"] for cpu, ppn in ((0.4, 1), (4, 2), (4, 9))
    ]
    assert "OMP_NUM_THREADS" not in environment(None, 1, None)
    assert environment(4, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_the_launcher_is_known_by_what_it_says_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ClusterError, match="no mpiexec of MPICH or Open MPI is on PATH"):
        find_launcher("auto") if shutil.which("mpiexec") is None else pytest.skip("there is a system-wide MPI")
    for name, says in (("mpiexec", "HYDRA build details"), ("mpirun", "mpirun (Open MPI) 5.0.11")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    assert ("mpich", str(tmp_path / "mpiexec")) == find_launcher("auto") == find_launcher("mpich")
    assert ("openmpi", str(tmp_path / "mpirun")) == find_launcher("openmpi")


def test_without_root_one_line_says_so() -> None:
    become_nobody = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else ""
    program = f"""
import os, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import virtual_cluster
{become_nobody}
sys.argv = ["virtual_cluster.py", "up", "2"]
sys.exit(virtual_cluster.main())
"""
    result = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"virtual_cluster: up needs root \(uid=\d+\)\. Use sudo -E[^\n]*\n", result.stderr)


def test_a_missing_command_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not() == "the command 'ip' is missing. Install the package iproute2."


# On real hosts.


@pytest.fixture(scope="module")
def possible() -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"no virtual hosts here: {reason}")


def ours() -> set[str]:
    """Return all that the kernel has under our name."""
    spaces = subprocess.run(["ip", "netns", "list"], text=True, capture_output=True, check=True).stdout
    mounts = Path("/proc/mounts").read_text()
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob("**/hpcnn.*")]
    folders = [str(path) for path in cluster_module.STATE.glob("*")]
    return {line for line in (*spaces.splitlines(), *mounts.splitlines(), *groups, *folders) if NAME in line}


@pytest.fixture(scope="module")
def hosts(possible: None) -> Iterator[Cluster]:
    cluster = Cluster(3, rate=f"{RATE_MBIT}mbit", cpu=CPU, memory=f"{MEMORY_MB}M", name=NAME)
    with cluster:
        assert len(ours()) >= 4
        yield cluster
        lingering = cluster.popen(1, ["sh", "-c", "echo up; exec sleep 600"], stdout=subprocess.PIPE)
        assert b"up\n" == lingering.stdout.readline()
    assert -signal.SIGKILL == lingering.wait(5)
    assert not ours()


def output_of(hosts: Cluster, capfd: pytest.CaptureFixture[str], start: Callable[[], int]) -> list[str]:
    capfd.readouterr()
    assert 0 == start()
    return capfd.readouterr().out.splitlines()


def test_every_host_has_a_name_an_address_and_a_shared_memory_of_its_own(
    hosts: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    command = "echo $RANK $WORLD_SIZE $(hostname) $(getent hosts $(hostname) | cut -d' ' -f1) $(ls /sys/class/net)"
    lines = output_of(hosts, capfd, lambda: hosts.each(["sh", "-c", f"{command}; touch /dev/shm/seen"]))
    assert [f"{host} 3 {NAME}-{host} 10.77.0.{host + 1} eth0 lo" for host in range(3)] == sorted(lines)
    assert not Path("/dev/shm/seen").exists()
    lines = output_of(hosts, capfd, lambda: hosts.each(["sh", "-c", "ls /dev/shm; rm /dev/shm/*"]))
    assert ["seen"] * 3 == lines


TRANSFER = """
import os, selectors, socket, sys, time
senders, receiver, size = eval(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rank, where = int(os.environ["RANK"]), ("10.77.0.%d" % (receiver + 1), 5000)
if rank == receiver:
    listener = socket.create_server(("", 5000))
    links = [listener.accept()[0] for _ in senders]
    begin = time.perf_counter()
    ready = selectors.DefaultSelector()
    for link in links:
        link.sendall(b"g")
        ready.register(link, selectors.EVENT_READ)
    left = size * len(links)
    while left:
        left -= sum(len(key.fileobj.recv(1 << 16)) for key, _ in ready.select())
    print(8e-6 * size * len(links) / (time.perf_counter() - begin))
elif rank in senders:
    for attempt in range(500):
        try:
            link = socket.create_connection(where)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    link.recv(1)
    link.sendall(bytes(size))
    link.recv(1)
"""


@pytest.mark.parametrize(("senders", "receiver"), [((0,), 1), ((1,), 0), ((0, 1), 2)])
def test_links_carry_their_rate_out_of_a_host_and_into_one(
    hosts: Cluster, capfd: pytest.CaptureFixture[str], senders: tuple[int, ...], receiver: int
) -> None:
    program = [sys.executable, "-c", TRANSFER, repr(senders), str(receiver), str(4_000_000 // len(senders))]
    for _ in range(4):  # a busy machine may be slower than the link
        (rate,) = map(float, output_of(hosts, capfd, lambda: hosts.each(program)))
        assert rate < 1.15 * RATE_MBIT
        if rate > 0.85 * RATE_MBIT:
            return
    pytest.fail(f"{rate:.1f} Mbit/s at best over a link of {RATE_MBIT}")


def test_a_host_gets_no_more_processor_time_than_its_share(hosts: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    burn = """
import multiprocessing, time
def burn(_):
    stop = time.perf_counter() + 0.8
    while time.perf_counter() < stop: pass
    return time.process_time()
with multiprocessing.get_context("fork").Pool(2) as pool:
    begin = time.perf_counter()
    used = sum(pool.map(burn, range(2), chunksize=1))
    print(used / (time.perf_counter() - begin))
"""
    (cores,) = output_of(hosts, capfd, lambda: hosts.each([sys.executable, "-c", burn], hosts=1))
    assert 0.1 * CPU < float(cores) < 1.2 * CPU


def test_a_host_that_takes_more_than_its_memory_loses_a_process_and_is_named(
    hosts: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    take = f"import time; kept = [bytearray(b'x' * 2**20) for _ in range({2 * MEMORY_MB})]"
    assert 128 + signal.SIGKILL == hosts.each([sys.executable, "-c", take], hosts=1)
    assert [1, 0, 0] == hosts.killed()
    assert f"{NAME}-0 ran out of memory ({MEMORY_MB}M)" in capfd.readouterr().err


def test_when_one_host_fails_the_others_are_ended_and_its_status_is_returned(hosts: Cluster) -> None:
    begin = time.monotonic()
    assert 7 == hosts.each(["sh", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 600"])
    assert time.monotonic() - begin < 20


MPI_PROGRAM = """
from mpi4py import MPI
world = MPI.COMM_WORLD
node = world.Split_type(MPI.COMM_TYPE_SHARED)
world.Allreduce(bytearray(300_000), bytearray(300_000), MPI.BOR)
names = world.gather((MPI.Get_processor_name(), node.size, world.rank - node.rank))
if world.rank == 0: print(names)
"""


def test_ranks_of_an_mpi_program_see_their_nodes_and_talk_over_the_links(
    hosts: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mpi4py")
    before = [sum(hosts.traffic(host)) for host in range(3)]
    command = [sys.executable, "-c", MPI_PROGRAM]
    (names,) = output_of(hosts, capfd, lambda: hosts.mpirun(command, ppn=2))
    assert [(f"{NAME}-{host}", 2, 2 * host) for host in (0, 0, 1, 1, 2, 2)] == eval(names)
    assert all(sum(hosts.traffic(host)) - before[host] > 300_000 for host in range(3))


def test_more_hosts_than_there_are_cannot_be_used(hosts: Cluster) -> None:
    with pytest.raises(ClusterError, match="cannot use 4 hosts: there are 3"):
        hosts.each(["true"], hosts=4)


def test_a_second_cluster_of_the_same_name_is_refused_and_status_tells_of_the_first(hosts: Cluster) -> None:
    result = script("up", "2", "--name", NAME)
    assert result.returncode == 2
    assert f"a cluster '{NAME}' is up already (3 hosts, rate {RATE_MBIT}mbit" in result.stderr
    lines = script("status", "--name", NAME).stdout.splitlines()
    assert lines[0].startswith(f"{NAME}: 3 hosts")
    assert f"{NAME}-2 10.77.0.3" in lines[3]


def test_what_somebody_else_made_under_our_name_is_left_alone(possible: None) -> None:
    name = f"{NAME}x"
    subprocess.run(["ip", "netns", "add", f"hpcnn.{name}-1"], check=True)
    try:
        result = script("up", "2", "--name", name)
        assert result.returncode == 2
        assert "exists and no record says that it is ours" in result.stderr
        script("down", "--name", name)
        assert Path(f"/run/netns/hpcnn.{name}-1").exists()
    finally:
        subprocess.run(["ip", "netns", "del", f"hpcnn.{name}-1"], check=True)
    assert not [line for line in ours() if name in line]


def started(name: str, *options: str) -> subprocess.Popen[str]:
    """Return a `run` whose program is at work."""
    command = [*SCRIPT, "run", "2", "--name", name, *options, "--", "sh", "-c", f"hostname; sleep 600 #{name}"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert [f"{name}-0\n", f"{name}-1\n"] == sorted(process.stdout.readline() for _ in range(2))
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_hosts_down(possible: None, number: signal.Signals) -> None:
    if not launcher_here():
        pytest.skip("no mpiexec on PATH")
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("interrupts are ignored, as in what a script starts in the background")
    process = started(f"{NAME}s")
    process.send_signal(number)
    assert 128 + number == process.wait(20)
    assert not asleep(f"{NAME}s")
    assert not [line for line in ours() if f"{NAME}s" in line]


def test_hosts_of_a_killed_run_are_removed_by_the_next_one(possible: None) -> None:
    if not launcher_here():
        pytest.skip("no mpiexec on PATH")
    name = f"{NAME}k"
    process = started(name)
    process.kill()
    process.wait()
    assert asleep(name)
    assert "left over from a run that was killed" in script("status", "--name", name).stderr
    result = script("run", "2", "--name", name, "--", "hostname")
    assert f"removing the hosts '{name}' that a killed run left" in result.stderr
    assert [f"{name}-0", f"{name}-1"] == sorted(result.stdout.split())
    assert not asleep(name)
    assert not [line for line in ours() if name in line]


def asleep(name: str) -> list[str]:
    """Return the processes on hosts of this name that `started` left."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [process.name] if f"sleep 600 #{name}" in (process / "cmdline").read_text() else []
    return found


def launcher_here() -> bool:
    with suppress(ClusterError):
        return bool(find_launcher("auto"))
    return False
