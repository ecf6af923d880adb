"""
Control groups of Linux: the memory and processor time that a container or a systemd unit may use.

A process belongs to a group of the version 2 hierarchy and to a group of each version 1 controller; hybrid systems have
both. The limits of a group and of all groups above it apply. https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_V2 = ""  # the name of the hierarchy without named controllers in /proc/self/cgroup


class GroupMemory(NamedTuple):
    """The limit of a group in bytes, and the bytes of it that are available."""

    limit: int
    available: int


class _MemoryFiles(NamedTuple):
    """Names of a group's files, and the keys of its memory.stat whose pages the kernel can reclaim."""

    controller: str
    limits: Sequence[str]
    usage: str
    reclaimable: Sequence[str]


_MEMORY_FILES = (
    # Above memory.high, a group is not killed, but slowed down until it has swapped enough: a limit as well.
    _MemoryFiles(
        _V2, ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable")
    ),
    # memory.memsw.limit_in_bytes, for memory and swap together, is never lower than this limit.
    _MemoryFiles(
        "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
)


def read_memory_limits(root: Path) -> list[GroupMemory]:
    """Return the memory of each limited group that this process is in; reclaimable pages are available."""
    memory = (_read_memory(folder, files) for files in _MEMORY_FILES for folder in _groups(root, files.controller))
    return [group for group in memory if group is not None]


def _read_memory(folder: Path, files: _MemoryFiles) -> GroupMemory | None:
    stat = dict(line.split(" ", 1) for line in read_text(folder / "memory.stat").splitlines() if " " in line)
    # A version 1 container cannot see the groups above it; the last value includes their limits.
    texts = [*(read_text(folder / name) for name in files.limits), stat.get("hierarchical_memory_limit", "")]
    limits, usage = [int(text) for text in texts if text.isdigit()], read_text(folder / files.usage)
    if not limits or not usage.isdigit():
        return None
    used = int(usage) - sum(int(stat.get(key, "0")) for key in files.reclaimable)
    return GroupMemory(min(limits), max(0, min(limits) - max(0, used)))


def read_cpu_quota(root: Path) -> float | None:
    """Return the processor time that this process may use, None without a limit; 1.5 is 150 ms every 100 ms."""
    quotas = [read_text(folder / "cpu.max").split() for folder in _groups(root, _V2)]
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas += [[read_text(folder / name) for name in names] for folder in _groups(root, "cpu")]
    limited = [quota for quota in quotas if len(quota) == 2 and all(map(str.isdigit, quota)) and int(quota[1])]
    return min((int(quota) / int(period) for quota, period in limited), default=None)


def memory_pressure_files(root: Path) -> list[Path]:
    """Return the paths of the pressure stall information of the groups that this process is in."""
    return [folder / "memory.pressure" for folder in _groups(root, _V2)]


def read_text(path: Path) -> str:
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
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")  # "4:cpu,cpuacct:/user.slice", "0::/user.slice"
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mounts(root: Path, controller: str) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """Return the group and the mount point of each mount of a hierarchy; see proc_pid_mountinfo(5)."""
    mounts = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), (*right.split(" "), "", "", "")[:3]
        is_hierarchy = kind == "cgroup2" if controller == _V2 else kind == "cgroup" and controller in options.split(",")
        if is_hierarchy and len(fields) > 4:
            mounts.append((_unescape(fields[3]), _unescape(fields[4])))
    return mounts


def _unescape(text: str) -> PurePosixPath:
    r"""Decode a path of mountinfo, in which a space is "\040"."""
    return PurePosixPath(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text))
