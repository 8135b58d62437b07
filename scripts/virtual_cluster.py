#!/usr/bin/env python3
"""Several small hosts on one machine, to see what a program does on a network.

A host is a network namespace behind a switch (a bridge), with a name, an address and a /dev/shm of its own; the file
system is shared, as it is on a cluster. Links are shaped in both directions, processor time and memory can be limited
(cgroup v1 or v2). Needs Linux, root, the commands `ip` and `tc`, Python 3.11, and nothing else.

    virtual_cluster.py up 4 --rate 1gbit --cpu 0.5          make the hosts vc-0 ... vc-3 (10.77.0.1 ...)
    virtual_cluster.py mpirun 4 --ppn 2 -- hpcnn train      2 ranks on each of 4 hosts, by the mpiexec on PATH
    virtual_cluster.py each 4 -- python worker.py           once on every host, with RANK, WORLD_SIZE, MASTER_ADDR ...
    virtual_cluster.py status                               what is up, and the traffic of every host
    virtual_cluster.py down                                 remove the hosts and whatever still runs on them
    virtual_cluster.py run 4 --rate 1gbit -- hpcnn train    up, mpirun and down in one
    virtual_cluster.py check                                whether all this works here, and if not, why

In Python: `with Cluster(4, rate="1gbit", cpu=0.5) as cluster: cluster.mpirun(["hpcnn", "train"])`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from virtual.cluster import NAME, Cluster, read_state, why_not
from virtual.kernel import execute, probe, run
from virtual.shape import ClusterError, Shape, address


def internal(verb: str, arguments: list[str]) -> None:
    """Do what this script asks of itself, as another process."""
    if verb == "_probe":
        probe(Shape(**json.loads(arguments[0])))
    elif verb == "_enter":
        Cluster.load(arguments[0]).enter(int(arguments[1]))
        execute(arguments[2:])
    else:  # in place of ssh: options, a host name, and words for its shell
        name, *words = arguments
        while words[0].startswith("-"):
            words.pop(0)
        cluster = Cluster.load(name)
        cluster.enter(cluster.shape.hostnames.index(words.pop(0)))
        execute(["/bin/sh", "-c", " ".join(words)])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before "--"."""
    parser = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in ("up", "mpirun", "each", "status", "down", "run", "check"):
        options = verbs.add_parser(verb)
        options.add_argument("--name", default="vc", help="of the cluster (vc)")
        if verb in ("up", "mpirun", "each", "run"):
            options.add_argument("hosts", type=int, metavar="N", help="number of hosts")
        if verb in ("up", "run"):
            options.add_argument("--rate", help="of each link in each direction: 100mbit, 1gbit")
            options.add_argument("--latency", help="delay from host to host: 100us, 1ms; needs netem in the kernel")
            options.add_argument("--cpu", type=float, metavar="CORES", help="processor time of each host: 0.5, 2")
            options.add_argument("--memory", help="of each host: 512M, 2G")
        if verb in ("mpirun", "run"):
            options.add_argument("--ppn", type=int, default=1, metavar="K", help="ranks on each host (1)")
            options.add_argument("--mpi", choices=("auto", "mpich", "openmpi"), default="auto")
        if verb in ("mpirun", "run", "each"):
            options.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable")
    return parser


def status(name: str) -> None:
    """Print what the cluster of this name is and does."""
    cluster = Cluster.load(name)
    print(f"{name}: {cluster.shape.describe()}")
    for host, hostname in enumerate(cluster.shape.hostnames):
        processes = len(run(f"ip netns pids {cluster.shape.namespaces[host]}").split())
        sent, received = (f"{count / 1e6:.1f} MB" for count in cluster.traffic(host))
        killed = f"   killed for want of memory {cluster.killed()[host]}" if cluster.shape.memory else ""
        print(f"  {hostname} {address(host)}   processes {processes}   sent {sent}   received {received}{killed}")


def command_line(arguments: list[str]) -> int:
    """Carry out one command and return the exit status."""
    before, _, command = (list(part) for part in split(arguments))
    args = make_parser().parse_args(before)
    verb = args.verb
    if verb in ("mpirun", "each", "run") and not command:
        raise ClusterError(f"{verb} needs a command after '--', as in `{NAME}.py {verb} 2 -- hostname`.")
    if verb == "check":
        reason = why_not()
        print(reason or "hosts can be made here")
        return 1 if reason else 0
    if os.geteuid() != 0:
        raise ClusterError(f"{verb} needs root (uid={os.geteuid()}). Use sudo -E.")
    shape = {key: getattr(args, key, None) for key in ("rate", "latency", "cpu", "memory", "name")}
    env = dict(setting.partition("=")[::2] for setting in getattr(args, "env", []))
    match verb:
        case "up":
            cluster = Cluster(args.hosts, **shape)
            cluster.up()
            print(f"{cluster.shape.describe()}: {' '.join(cluster.shape.hostnames)}")
        case "run":
            with Cluster(args.hosts, **shape) as cluster:
                return cluster.mpirun(command, ppn=args.ppn, mpi=args.mpi, env=env)
        case "mpirun":
            return Cluster.load(args.name).mpirun(command, hosts=args.hosts, ppn=args.ppn, mpi=args.mpi, env=env)
        case "each":
            return Cluster.load(args.name).each(command, hosts=args.hosts, env=env)
        case "status":
            status(args.name)
        case "down":
            state = read_state(args.name)
            if state is not None:
                Cluster.from_state(state).down()
            print(f"removed '{args.name}'" if state else f"no cluster '{args.name}' was up")
    return 0


def split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return what comes before, at and after the first "--"."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at : at + 1], arguments[at + 1 :]


def main() -> int:
    """Run the command line; errors are one line."""
    arguments = sys.argv[1:]
    try:
        if arguments and arguments[0].startswith("_"):
            internal(arguments[0], arguments[1:])
            return 0
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        return command_line(arguments)
    except ClusterError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
