"""
Facts about this machine: processor, cores, memory. Every probe can be replaced, so a laptop is three lines in a test.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What matters to llama.cpp's kernels, by the names that the kernel (Linux) or sysctl (macOS) uses.
FEATURES = (
    "avx",
    "avx2",
    "f16c",
    "fma",
    "bmi2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: altogether, and what a new program can have without anything being swapped out."""

    total: int
    available: int


@dataclass(frozen=True)
class Machine:
    """
    One machine. `cores` are those worth a thread each: physical, fast ones, no more than the container's quota.

    `stalled` tells for how much (0 to 1) of the last ten seconds everything waited for memory; 0 where it is not known.
    """

    cores: int
    memory: Callable[[], Memory]
    processor: str = ""
    features: frozenset[str] = frozenset()
    stalled: Callable[[], float] = lambda: 0.0


def this_machine(root: Path = Path("/")) -> Machine:
    """The machine we run on; `root` stands for the file system of another Linux one in tests."""
    return Machine(_cores(root), lambda: _memory(root), _processor(root), _features(root), lambda: _stalled(root))


def power_source() -> str:
    """ "battery" where the machine runs on one, "mains" otherwise."""
    import psutil

    state = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return "battery" if state is not None and state.power_plugged is False else "mains"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cores(root: Path) -> int:
    allowed = len(os.sched_getaffinity(0)) if root == Path("/") and hasattr(os, "sched_getaffinity") else None
    counts = [count for count in (_fast_cores(root), _physical_cores(root), _quota(root), allowed) if count]
    return max(1, min(counts, default=os.cpu_count() or 1))


def _physical_cores(root: Path) -> int | None:
    """Cores that are not the second thread of another one; on virtual machines each virtual one counts."""
    import psutil

    if root != Path("/") or sys.platform == "linux":
        siblings = {_read(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")}
        if siblings:
            return len(siblings)
    count: int | None = psutil.cpu_count(logical=False)
    return count


def _fast_cores(root: Path) -> int | None:
    """Performance cores of a processor that has slower ones too (Intel hybrid on Linux, Apple silicon)."""
    listed = _read(root / "sys/devices/cpu_core/cpus")
    if listed:
        threads = _count_list(listed)
        per_core = (
            2
            if _count_list(_read(root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list") or "0") > 1
            else 1
        )
        return threads // per_core
    if sys.platform == "darwin" and root == Path("/"):
        answer = os.popen("sysctl -n hw.perflevel0.physicalcpu 2>/dev/null").read().strip()
        return int(answer) if answer.isdigit() else None
    return None


def _count_list(text: str) -> int:
    """How many numbers a kernel list names: "0-3,8" names 5."""
    total = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += (int(last) if last.isdigit() else int(first)) - int(first) + 1
    return total


def _quota(root: Path) -> int | None:
    """Whole processors that a container may use (cgroup v2 and v1), None without a limit."""
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return max(1, int(quota) // int(period))
    return None


def _memory(root: Path) -> Memory:
    import psutil

    state = psutil.virtual_memory()
    total, available = int(state.total), int(state.available)
    if root != Path("/"):
        fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
        total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    group = _group_limit(root)
    if group:
        total, available = min(total, group.total), min(available, group.available)
    return Memory(total, available)


def _group_limit(root: Path) -> Memory | None:
    """What the container's limit leaves (cgroup v2); file pages that can be dropped count as free."""
    group = root / "sys/fs/cgroup"
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return None
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    reclaimable = int(stat.get("inactive_file", "0"))
    return Memory(int(limit), max(0, int(limit) - int(used) + reclaimable))


def _stalled(root: Path) -> float:
    """
    Linux's pressure stall information, of the machine or of the container, whichever is worse.

    The line "full avg10=12.50 avg60=…" is 0.125: https://docs.kernel.org/accounting/psi.html
    """
    worst = 0.0
    for path in (root / "proc/pressure/memory", root / "sys/fs/cgroup/memory.pressure"):
        for line in _read(path).splitlines():
            kind, _, rest = line.partition(" avg10=")
            share = rest.split(" ")[0]
            if kind == "full" and share.replace(".", "", 1).isdigit():
                worst = max(worst, float(share) / 100)
    return worst


def _processor(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _features(root: Path) -> frozenset[str]:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.partition(":")[2].split()) & frozenset(FEATURES)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        told = os.popen("sysctl hw.optional.arm 2>/dev/null").read()
        known = {"FEAT_DotProd: 1": "asimddp", "FEAT_I8MM: 1": "i8mm"}
        return frozenset({"asimd", *(feature for line, feature in known.items() if line in told)})
    return frozenset()
