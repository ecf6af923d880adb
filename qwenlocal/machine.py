"""
Probes of the machine: processor, cores, memory, power.

Every probe is a field of `Machine` or reads below a `root` folder, so that a test can simulate a laptop in three lines.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# CPU features that llama.cpp's kernels use, by their names in Linux (/proc/cpuinfo).
_CPU_FEATURES = frozenset(
    ("avx", "avx2", "f16c", "fma", "bmi2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm",
     "sve")
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: `total`, and `available` to a new program without swapping."""

    total: int
    available: int


@dataclass(frozen=True)
class Machine:
    """
    A machine. `cores` counts the physical performance cores, up to the container's quota.

    `memory_pressure` returns the share (0 to 1) of the last ten seconds in which all processes waited for memory; 0 if
    unknown.
    """

    cores: int
    memory: Callable[[], Memory]
    processor: str = ""
    features: frozenset[str] = frozenset()
    memory_pressure: Callable[[], float] = lambda: 0.0


def this_machine(root: Path = Path("/")) -> Machine:
    """Probe this machine; in tests, `root` is the file system of a simulated Linux machine."""
    return Machine(
        _cores(root), lambda: _memory(root), _processor(root), _features(root), lambda: _memory_pressure(root)
    )


def power_source() -> str:
    """Return "battery" if the machine runs on battery, else "mains"."""
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
    """Count cores without their hyperthreads; on a virtual machine, each virtual CPU counts."""
    import psutil

    if root != Path("/") or sys.platform == "linux":
        siblings = {_read(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")}
        if siblings:
            return len(siblings)
    count: int | None = psutil.cpu_count(logical=False)
    return count


def _fast_cores(root: Path) -> int | None:
    """Count the performance cores of a hybrid processor (Intel on Linux, Apple silicon); None for other ones."""
    if cpu_list := _read(root / "sys/devices/cpu_core/cpus"):
        siblings = _read(root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list") or "0"
        per_core = 2 if _count_cpus(siblings) > 1 else 1
        return _count_cpus(cpu_list) // per_core
    if sys.platform == "darwin" and root == Path("/"):
        output = os.popen("sysctl -n hw.perflevel0.physicalcpu 2>/dev/null").read().strip()
        return int(output) if output.isdigit() else None
    return None


def _count_cpus(text: str) -> int:
    """Count the CPUs in a list of the kernel: "0-3,8" lists 5."""
    total = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += (int(last) if last.isdigit() else int(first)) - int(first) + 1
    return total


def _quota(root: Path) -> int | None:
    """Return the number of whole CPUs that the container may use (cgroup v2 and v1); None without a limit."""
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return max(1, int(quota) // int(period))
    return None


def _memory(root: Path) -> Memory:
    import psutil

    if root == Path("/"):
        state = psutil.virtual_memory()
        memory = Memory(int(state.total), int(state.available))
    else:
        fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
        memory = Memory(*(int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")))
    limit = _container_memory(root)
    return Memory(min(memory.total, limit.total), min(memory.available, limit.available)) if limit else memory


def _container_memory(root: Path) -> Memory | None:
    """Read the container's memory limit (cgroup v2); reclaimable file pages count as available."""
    group = root / "sys/fs/cgroup"
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return None
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    reclaimable = int(stat.get("inactive_file", "0"))
    return Memory(int(limit), max(0, int(limit) - int(used) + reclaimable))


def _memory_pressure(root: Path) -> float:
    """
    Read Linux's pressure stall information of the machine and the container, and return the worse one.

    "full avg10=12.50 avg60=…" means 0.125: https://docs.kernel.org/accounting/psi.html
    """
    worst = 0.0
    for path in (root / "proc/pressure/memory", root / "sys/fs/cgroup/memory.pressure"):
        for line in _read(path).splitlines():
            kind, _, rest = line.partition(" avg10=")
            share = rest.split(" ")[0]
            if kind == "full" and share.replace(".", "", 1).isdigit():
                worst = max(worst, float(share) / 100)
    return worst


def _cpuinfo(root: Path, *keys: str) -> str:
    """Return the value of the first line of /proc/cpuinfo that starts with one of `keys`; "" if there is none."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(keys)), "")


def _processor(root: Path) -> str:
    return _cpuinfo(root, "model name", "hardware") or platform.processor() or platform.machine()


def _features(root: Path) -> frozenset[str]:
    if features := _cpuinfo(root, "flags", "features"):
        return _CPU_FEATURES.intersection(features.split())
    if sys.platform == "darwin" and platform.machine() == "arm64":
        output = os.popen("sysctl hw.optional.arm 2>/dev/null").read()
        optional = {"FEAT_DotProd: 1": "asimddp", "FEAT_I8MM: 1": "i8mm"}
        return frozenset({"asimd", *(feature for line, feature in optional.items() if line in output)})
    return frozenset()
