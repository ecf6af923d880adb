"""
Control groups of Linux: the memory and processor time that a container or a systemd unit may use.

A process belongs to a group of the version 2 hierarchy and to a group of each version 1 controller; hybrid systems have
both. The limits of a group and of all groups above it apply. https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_V2 = ""  # the name of the hierarchy without named controllers in /proc/self/cgroup
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # keys of memory.stat


class GroupMemory(NamedTuple):
    """The limit of a group in bytes, and the bytes of it that are available."""

    limit: int
    available: int


def read_memory_limits(root: Path) -> list[GroupMemory]:
    """Return the memory of each limited group that this process is in; reclaimable pages are available."""
    groups = map(_read_memory, [*_groups(root, _V2), *_groups(root, "memory")])
    return [group for group in groups if group is not None]


def _read_memory(folder: Path) -> GroupMemory | None:
    """Read the limit and the use of a group of either version; the names of their files differ."""
    stat = dict(line.split(" ", 1) for line in read_kernel_file(folder / "memory.stat").splitlines() if " " in line)
    # Above memory.high, a group is slowed down until it has swapped enough. A version 1 container cannot see the groups
    # above it; hierarchical_memory_limit includes their limits.
    texts = [read_kernel_file(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limits = [int(text) for text in (*texts, stat.get("hierarchical_memory_limit", "")) if text.isdigit()]
    usage = read_kernel_file(folder / "memory.current") or read_kernel_file(folder / "memory.usage_in_bytes")
    if not limits or not usage.isdigit():
        return None
    # In version 1, only the totals include the groups below.
    reclaimable = sum(int(stat.get(f"total_{key}", stat.get(key, "0"))) for key in _RECLAIMABLE)
    return GroupMemory(min(limits), max(0, min(limits) - max(0, int(usage) - reclaimable)))


def read_cpu_quota(root: Path) -> float | None:
    """Return the processor time that this process may use, None without a limit; 1.5 is 150 ms every 100 ms."""
    quotas = [read_kernel_file(folder / "cpu.max").split() for folder in _groups(root, _V2)]
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas += [[read_kernel_file(folder / name) for name in names] for folder in _groups(root, "cpu")]
    limited = [quota for quota in quotas if len(quota) == 2 and all(map(str.isdigit, quota)) and int(quota[1])]
    return min((int(quota) / int(period) for quota, period in limited), default=None)


def memory_pressure_files(root: Path) -> list[Path]:
    """Return the paths of the pressure stall information of the groups that this process is in."""
    return [folder / "memory.pressure" for folder in _groups(root, _V2)]


def read_kernel_file(path: Path) -> str:
    """Return the text of a file of the kernel; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's group and of the visible groups above it, lowest first."""
    path, mounts = _group_path(root, controller), _mounts(root, controller)
    if path is None or not mounts:
        return []
    # The root of a mount is the group at its mount point: a container's own group, as seen from the host. If the path
    # is in no mount, the process is outside of the container's namespace, and the mount point is all that is known.
    group, point = next(((group, point) for group, point in mounts if path.is_relative_to(group)), (path, mounts[0][1]))
    below = path.relative_to(group)
    if ".." in below.parts:
        below = PurePosixPath()
    return [root / point.relative_to("/") / part for part in (below, *below.parents)]


def _group_path(root: Path, controller: str) -> PurePosixPath | None:
    for line in read_kernel_file(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")  # "4:cpu,cpuacct:/user.slice", "0::/user.slice"
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mounts(root: Path, controller: str) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """Return the group and the mount point of each mount of a hierarchy; see proc_pid_mountinfo(5)."""
    mounts = []
    for line in read_kernel_file(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), (*right.split(" "), "", "", "")[:3]
        is_hierarchy = kind == "cgroup2" if controller == _V2 else kind == "cgroup" and controller in options.split(",")
        if is_hierarchy and len(fields) > 4:
            mounts.append((_unescape(fields[3]), _unescape(fields[4])))
    return mounts


def _unescape(text: str) -> PurePosixPath:
    r"""Decode a path of mountinfo, in which a space is "\040"."""
    return PurePosixPath(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text))
