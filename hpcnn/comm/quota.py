"""CPU quotas of Linux control groups: how much time on the cores this process is granted.

A container, or a step of a job, may see sixteen cores and be granted the time of two. Threads beyond that use up the
quota of a period in a part of it, and then all stand still until the next.

Control groups form a tree, and each of its levels may have a quota. Version 2 keeps quota and period in `cpu.max`,
version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


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
    try:
        mounts = list(parse_mounts((root / "proc/self/mountinfo").read_text()))
        paths = parse_groups((root / "proc/self/cgroup").read_text())
    except OSError:
        return {}  # not Linux
    quotas = {}
    for mount in mounts:
        if mount.version not in paths:
            continue
        for folder in _levels(root, mount, paths[mount.version]):
            cores = _quota(folder, mount.version)
            if cores is not None:
                # The number tells groups apart that have the same path in different containers.
                status = folder.stat()
                quotas[f"{status.st_dev}:{status.st_ino}"] = cores
    return quotas


def parse_mounts(mountinfo: str) -> Iterator[Mount]:
    """Yield the mounts that a text such as /proc/self/mountinfo lists and that may have CPU quotas."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if "-" not in fields[5:]:
            continue
        kind, _, options = [*fields[fields.index("-", 5) + 1 :], "", "", ""][:3]
        version = {"cgroup2": 2, "cgroup": 1 if "cpu" in options.split(",") else 0}.get(kind, 0)
        if version:
            yield Mount(version, PurePosixPath(_plain(fields[3])), PurePosixPath(_plain(fields[4])))


def parse_groups(cgroup: str) -> dict[int, PurePosixPath]:
    """Return the path of the process's group, by version, from a text such as /proc/self/cgroup."""
    paths = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
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
