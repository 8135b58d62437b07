"""What the hosts of a virtual cluster are like, in words, numbers and what the kernel is to be told."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HOSTS = 250
SPEEDS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
SIZES = {"M": 2.0**20, "G": 2.0**30}
TIMES = {"us": 1e-6, "ms": 1e-3}
CPU_PERIOD_US, LEAST_QUOTA_US = 20_000, 1_000
# A link may send at once what has gathered in its bucket. A millisecond's worth keeps up the rate when the kernel's
# timer comes late, and is little beside any message worth timing. Offloaded segments must fit in.
BUCKET_S, LEAST_BUCKET_BYTES, QUEUE_MS = 1e-3, 16_000, 200

NETWORK = "10.77.0.0/16"
# What paces its sends by delays that it measures (bbr) misreads a shaper behind a link that is otherwise instantaneous.
TCP = "reno"

# A file of a control group and what to write into it; a "?" after the name of one that not every kernel has.
Limits = list[tuple[str, str]]


class ClusterError(Exception):
    """What a user can mend; the message is one line."""


@dataclass(frozen=True)
class Shape:
    """How many hosts there are and what they are like."""

    num_hosts: int
    rate: str | None = None
    latency: str | None = None
    cpu: float | None = None
    memory: str | None = None
    name: str = "vc"

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z][a-z0-9]{0,15}", self.name):
            raise ClusterError(f"name (={self.name!r}) must be 1 to 16 lower-case letters and digits, a letter first.")
        if not 1 <= self.num_hosts <= MAX_HOSTS:
            raise ClusterError(f"the number of hosts (={self.num_hosts}) must be 1 to {MAX_HOSTS}.")
        if self.cpu is not None and not self.cpu * CPU_PERIOD_US >= LEAST_QUOTA_US:
            raise ClusterError(f"cpu (={self.cpu:g}) must be at least {LEAST_QUOTA_US / CPU_PERIOD_US:g} cores.")
        for name, units in (("rate", SPEEDS), ("latency", TIMES), ("memory", SIZES)):
            if getattr(self, name) is not None:
                parse(name, getattr(self, name), units)

    @property
    def hostnames(self) -> list[str]:
        """What the hosts call themselves."""
        return [f"{self.name}-{host}" for host in range(self.num_hosts)]

    @property
    def namespaces(self) -> list[str]:
        """The hosts' network namespaces and, last, that of the switch."""
        return [f"hpcnn.{hostname}" for hostname in (*self.hostnames, f"{self.name}-switch")]

    def shaping(self, *, delayed: bool = True) -> list[str]:
        """Return `tc` commands, without the device, that shape what one end of a link sends."""
        commands, parent = [], "root"
        if self.rate is not None:
            bits = round(parse("rate", self.rate, SPEEDS))
            commands.append(f"root handle 1: tbf rate {bits}bit burst {self.bucket_bytes()} latency {QUEUE_MS}ms")
            parent = "parent 1:"
        if self.latency is not None and delayed:
            delay_us = round(parse("latency", self.latency, TIMES) * 1e6)
            commands.append(f"{parent} handle 2: netem delay {delay_us}us limit 100000")
        return commands

    def bucket_bytes(self) -> int:
        """Return how much a link may send at once."""
        return max(LEAST_BUCKET_BYTES, round(parse("rate", self.rate or "", SPEEDS) / 8 * BUCKET_S))

    def limits(self) -> dict[str, dict[str, Limits]]:
        """Return what to write into control groups, by controller and version ("cgroup" is 1)."""
        limits: dict[str, dict[str, Limits]] = {}
        if self.cpu is not None:
            quota, period = str(round(self.cpu * CPU_PERIOD_US)), str(CPU_PERIOD_US)
            first = [("cpu.cfs_period_us", period), ("cpu.cfs_quota_us", quota)]
            limits["cpu"] = {"cgroup": first, "cgroup2": [("cpu.max", f"{quota} {period}")]}
        if self.memory is not None:
            size = str(round(parse("memory", self.memory, SIZES)))
            first = [("memory.limit_in_bytes", size), ("memory.memsw.limit_in_bytes?", size)]
            limits["memory"] = {"cgroup": first, "cgroup2": [("memory.max", size), ("memory.swap.max?", "0")]}
        return limits

    def describe(self) -> str:
        """Return the shape in words."""
        limits = {"rate": self.rate, "latency": self.latency, "cpu": self.cpu, "memory": self.memory}
        return ", ".join([f"{self.num_hosts} hosts", *(f"{name} {limits[name]}" for name in limits if limits[name])])


def parse(name: str, text: str, units: Mapping[str, float]) -> float:
    """Return the positive number that `text` stands for; it ends in a unit."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(units)})", text)
    if not match or not float(match[1]):
        unit = " or ".join(units)
        raise ClusterError(f"{name} (={text!r}) must be a positive number and {unit}, '1{[*units][-1]}' for instance.")
    return float(match[1]) * units[match[2]]


def address(host: int) -> str:
    """Return the IP address of a host."""
    return f"10.77.0.{host + 1}"


def control_groups(limits: Mapping[str, Any], mounts: str) -> dict[str, tuple[str, Path]]:
    """Return, by controller, the version ("cgroup", "cgroup2") and the folder in which to make control groups.

    Parameters
    ----------
    limits : mapping
        Its keys are the controllers that are needed.
    mounts : str
        The text of /proc/mounts.
    """
    found: dict[str, tuple[str, Path]] = {}
    for _, folder, kind, options, *_ in map(str.split, mounts.splitlines()):
        known = options.split(",") if kind == "cgroup" else []
        if kind == "cgroup2":
            known = (Path(folder) / "cgroup.controllers").read_text().split()
        found |= {name: (kind, Path(folder)) for name in limits if name in known and name not in found}
    for name in limits:
        if name not in found:
            raise ClusterError(f"no control group here can limit {name}. Leave out --{name}, or mount /sys/fs/cgroup.")
        kind, folder = found[name]
        if kind == "cgroup2" and name not in (folder / "cgroup.subtree_control").read_text().split():
            raise ClusterError(
                f"the controller '{name}' is not delegated to the groups in {folder}."
                f" Leave out --{name}, or `echo +{name} > {folder}/cgroup.subtree_control`."
            )
        if not os.access(folder, os.W_OK):
            raise ClusterError(f"control groups cannot be made in {folder}: it is read-only. Leave out --{name}.")
    return found
