"""Limits of Linux control groups: how much time on the cores, and how much memory, this process is granted.

A container, or a step of a job, may see sixteen cores and be granted the time of two. Threads beyond that use up the
quota of a period in a part of it, and then all stand still until the next.

Control groups form a tree, and each of its levels may have a quota. Version 2 keeps quota and period in `cpu.max`,
version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`. Memory is limited by `memory.max`, formerly
`memory.limit_in_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

UNLIMITED_BYTES = 1 << 60
"""Version 1 says "no limit" with a number near 2^63."""


class Mount(NamedTuple):
    """Where a tree of control groups can be seen."""

    version: int
    root: PurePosixPath
    """The group that is seen at `point`: in a container often not the topmost."""
    point: PurePosixPath


def cpu_quotas(root: Path = Path("/")) -> dict[str, float]:
    """Return the quotas over this process in cores, by the control group that has it; empty where there are none.

    Parameters
    ----------
    root : Path
        Where the file system begins.
    """
    quotas = {}
    for folder, version in _groups(root, "cpu"):
        cores = _quota(folder, version)
        if cores is not None:
            # The number tells groups apart that have the same path in different containers.
            status = folder.stat()
            quotas[f"{status.st_dev}:{status.st_ino}"] = cores
    return quotas


def memory_limit(root: Path = Path("/")) -> tuple[int | None, int]:
    """Return the limit that leaves the least memory to this process and what is used of it, in bytes; None, 0 without.

    Pages of files that could be given back count as used by the kernel and are taken off here.

    Parameters
    ----------
    root : Path
        Where the file system begins.
    """
    found: list[tuple[int, int]] = []
    for folder, version in _groups(root, "memory"):
        names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
        try:
            limit, used = ((folder / name).read_text().strip() for name in names)
            stat = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the topmost group has no such file
        if limit.isdecimal() and int(limit) < UNLIMITED_BYTES:
            reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            found.append((int(limit), max(0, int(used) - reclaimable)))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(None, 0))


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's groups and of those above, with the version of their files."""
    try:
        mounts = list(parse_mounts((root / "proc/self/mountinfo").read_text(), controller))
        paths = parse_groups((root / "proc/self/cgroup").read_text(), controller)
    except OSError:
        return  # not Linux
    for mount in mounts:
        if mount.version in paths:
            for folder in _levels(root, mount, paths[mount.version]):
                yield folder, mount.version


def parse_mounts(mountinfo: str, controller: str = "cpu") -> Iterator[Mount]:
    """Yield the mounts that a text such as /proc/self/mountinfo lists and that may have limits of a controller."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if "-" not in fields[5:]:
            continue
        kind, _, options = [*fields[fields.index("-", 5) + 1 :], "", "", ""][:3]
        version = {"cgroup2": 2, "cgroup": 1 if controller in options.split(",") else 0}.get(kind, 0)
        if version:
            yield Mount(version, PurePosixPath(_plain(fields[3])), PurePosixPath(_plain(fields[4])))


def parse_groups(cgroup: str, controller: str = "cpu") -> dict[int, PurePosixPath]:
    """Return the path of the process's group, by version, from a text such as /proc/self/cgroup."""
    paths = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = PurePosixPath(path)
        elif controller in controllers.split(","):
            paths[1] = PurePosixPath(path)
    return paths


def parse_cpu_max(text: str) -> float | None:
    """Return the cores that a text such as "45000 100000" grants; None for "max 100000"."""
    quota, period = [*text.split(), "100000"][:2]
    return _cores(quota, period)


def _cores(quota: str, period: str) -> float | None:
    if not quota.isdecimal() or not period.isdecimal() or int(quota) == 0 or int(period) == 0:
        return None  # "max", or -1
    return int(quota) / int(period)


def _levels(root: Path, mount: Mount, path: PurePosixPath) -> Iterator[Path]:
    """Yield the folders of a group and of those above it, as far as they can be seen."""
    point = root / str(mount.point).lstrip("/")
    seen = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    if ".." in seen.parts:
        seen = PurePosixPath()  # the group lies outside what this container sees
    folder = point / seen
    while folder != point:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    yield point


def _quota(folder: Path, version: int) -> float | None:
    try:
        if version == 2:
            return parse_cpu_max((folder / "cpu.max").read_text())
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return _cores(quota, period)
    except OSError:
        return None  # the topmost group has no such file


def _plain(text: str) -> str:
    """Undo the escapes of mountinfo."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
