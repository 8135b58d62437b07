"""CPU quotas of control groups, on trees of files as Linux shows them."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import pytest

from hpcnn.comm.library import NodeShare
from hpcnn.comm.quota import cpu_quotas, memory_limit, parse_cpu_max, parse_groups, parse_mounts

V1 = "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
V2 = "41 31 0:38 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def tree(folder: Path, mountinfo: str, cgroup: str, files: dict[str, str]) -> Path:
    """Write a root file system with the given files."""
    for name, text in {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def quotas(*args) -> list[float]:
    return sorted(cpu_quotas(tree(*args)).values())


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", None), ("45000 100000\n", 0.45), ("200000 100000", 2.0), ("50000", 0.5), ("max", None)],
)
def test_cpu_max_is_quota_over_period(text, cores):
    assert cores == parse_cpu_max(text)


def test_the_paths_of_both_versions_are_found_among_other_controllers():
    text = "12:cpuset:/a\n5:cpu,cpuacct:/slurm/job:1/step\n3:cpuacct:/wrong\n1:name=systemd:/b\n0::/user.slice\n"
    assert {1: PurePosixPath("/slurm/job:1/step"), 2: PurePosixPath("/user.slice")} == parse_groups(text)


def test_only_mounts_that_may_hold_cpu_quotas_are_taken():
    other = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n22 1 8:1 / / rw - ext4 /dev/sda rw,cpu"
    spaced = "50 31 0:29 /docker/ab /mnt/with\\040space rw shared:3 master:4 - cgroup2 none rw"
    found = [
        (mount.version, str(mount.root), str(mount.point)) for mount in parse_mounts("\n".join([V1, other, spaced]))
    ]
    assert [(1, "/", "/sys/fs/cgroup/cpu,cpuacct"), (2, "/docker/ab", "/mnt/with space")] == found


def test_every_level_of_version_2_counts_and_the_topmost_has_none(tmp_path):
    base = "sys/fs/cgroup/system.slice"
    files = {
        f"{base}/cpu.max": "800000 100000",
        f"{base}/job/cpu.max": "max 100000",
        f"{base}/job/0/cpu.max": "45000 100000",
    }
    assert [0.45, 8.0] == quotas(tmp_path, V2, "0::/system.slice/job/0", files)


def test_the_groups_of_others_do_not_count(tmp_path):
    files = {"sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/b/cpu.max": "100000 100000"}
    assert [] == quotas(tmp_path, V2, "0::/a", files)


def test_version_1_has_quota_and_period_in_two_files(tmp_path):
    base = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{base}/cpu.cfs_quota_us": "-1", f"{base}/cpu.cfs_period_us": "100000"}
    files |= {f"{base}/job/cpu.cfs_quota_us": "150000", f"{base}/job/cpu.cfs_period_us": "100000"}
    assert [1.5] == quotas(tmp_path, f"{V1}\n{V2}", "4:cpu,cpuacct:/job\n0::/", files)


@pytest.mark.parametrize("path", ["/docker/ab", "/", "/../../elsewhere", "/docker/ab/../cd"])
def test_in_a_container_the_mount_shows_the_group_whatever_path_the_kernel_tells(tmp_path, path):
    mount = V2.replace(" / /sys", " /docker/ab /sys")
    beside = {"sys/fs/cd/cpu.max": "100000 100000", "sys/elsewhere/cpu.max": "100000 100000"}
    assert [2.0] == quotas(tmp_path, mount, f"0::{path}", {"sys/fs/cgroup/cpu.max": "200000 100000", **beside})


def test_a_system_without_control_groups_has_no_quotas(tmp_path):
    assert {} == cpu_quotas(tmp_path)
    assert [] == quotas(tmp_path, "22 1 8:1 / / rw - ext4 /dev/sda rw", "", {})


def test_two_groups_of_the_same_name_in_different_trees_are_told_apart(tmp_path):
    both = [cpu_quotas(tree(tmp_path / name, V2, "0::/", {"sys/fs/cgroup/cpu.max": "100000 100000"})) for name in "ab"]
    assert 2 == len({group for found in both for group in found})


@pytest.mark.parametrize(
    ("quota", "num_sharing", "num_threads", "rationed"),
    [
        (math.inf, 1, 8, False),
        (0.45, 1, 1, True),
        (1.0, 1, 1, False),
        (1.5, 1, 2, False),
        (2.0, 1, 2, False),
        (2.0, 2, 1, False),
        (2.0, 4, 1, True),
        (7.5, 2, 4, False),
        (100.0, 1, 8, False),
    ],
)
def test_a_quota_limits_threads_to_its_cores_and_tells_when_ranks_must_share_them(
    quota, num_sharing, num_threads, rationed
):
    share = NodeShare(0, 4, num_cores=16, num_sharing=2, quota_cores=quota, num_sharing_quota=num_sharing)
    assert (num_threads, rationed) == (share.num_threads, share.rationed)


M1 = "37 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
NO_LIMIT_V1 = str(2**63 - 4096)


def test_memory_limit_of_version_2_is_the_level_with_the_least_left(tmp_path):
    base = "sys/fs/cgroup/slurm"
    files = {
        f"{base}/memory.max": "4000",
        f"{base}/memory.current": "3500",
        f"{base}/memory.stat": "anon 100\ninactive_file 700",
        f"{base}/job/memory.max": "2000",
        f"{base}/job/memory.current": "100",
        f"{base}/job/memory.stat": "anon 100\ninactive_file 0",
    }
    assert memory_limit(tree(tmp_path, V2, "0::/slurm/job", files)) == (4000, 2800)


def test_memory_limit_of_version_1_knows_its_number_for_none(tmp_path):
    base = "sys/fs/cgroup/memory"
    files = {
        f"{base}/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{base}/memory.usage_in_bytes": "900",
        f"{base}/memory.stat": "total_inactive_file 5",
    }
    assert memory_limit(tree(tmp_path, M1, "4:memory:/", files)) == (None, 0)
    files[f"{base}/memory.limit_in_bytes"] = "1000"
    assert memory_limit(tree(tmp_path, M1, "4:memory:/", files)) == (1000, 895)
    assert memory_limit(tree(tmp_path, V1, "5:cpu,cpuacct:/", {})) == (None, 0)
