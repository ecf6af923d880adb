"""
Probes of the machine: processor, cores, memory, power.

Every probe is a field of `Machine` or reads below a `root` folder, so that a test can simulate a laptop in three lines.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwenlocal.cgroups import memory_pressure_files, read_cpu_quota, read_kernel_file, read_memory_limits

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


class CpuTimes(NamedTuple):
    """Seconds of processor time since some moment: `used` by this process, and `free`, which it could have used."""

    used: float
    free: float


@dataclass(frozen=True)
class Machine:
    """
    A machine, as far as this process may use it: its affinity and the limits of its control groups are included.

    `cores` counts the physical performance cores, `logical_cores` all cores with their hyperthreads.

    `memory_pressure` returns the share (0 to 1) of the last ten seconds in which all processes waited for memory; 0 if
    unknown. `cpu_times` reads the processor times; None if unknown.
    """

    cores: int
    memory: Callable[[], Memory]
    processor: str = ""
    features: frozenset[str] = frozenset()
    memory_pressure: Callable[[], float] = lambda: 0.0
    logical_cores: int = 1
    cpu_times: Callable[[], CpuTimes] | None = None


def this_machine(root: Path = Path("/")) -> Machine:
    """Probe this machine; in tests, `root` is the file system of a simulated Linux machine."""
    logical_cores = _logical_cores(root)
    return Machine(
        min(_physical_cores(root), logical_cores),
        lambda: _memory(root),
        _processor(root),
        _features(root),
        lambda: _memory_pressure(root),
        logical_cores,
        functools.partial(_cpu_times, frozenset(_usable_cpus(root))),
    )


def power_source() -> str:
    """Return "battery" if the machine runs on battery, else "mains"."""
    import psutil

    state = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return "battery" if state is not None and state.power_plugged is False else "mains"


def _logical_cores(root: Path) -> int:
    quota, count = read_cpu_quota(root), len(_usable_cpus(root)) or os.cpu_count() or 1
    return count if quota is None else max(1, min(count, int(quota)))


def _physical_cores(root: Path) -> int:
    """
    Count the performance cores that this process may use, without hyperthreads.

    On a virtual machine, each virtual CPU counts. Performance cores are told apart on Intel processors with Linux, and
    on Apple silicon.
    """
    if cpus := _usable_cpus(root):
        fast = cpus.keys() & _parse_cpus(read_kernel_file(root / "sys/devices/cpu_core/cpus"))
        return len({cpus[cpu] for cpu in fast or cpus})
    if sys.platform == "darwin":
        output = os.popen("sysctl -n hw.perflevel0.physicalcpu 2>/dev/null").read().strip()
        if output.isdigit():
            return int(output)
    import psutil

    return psutil.cpu_count(logical=False) or _logical_cores(root)


def _usable_cpus(root: Path) -> dict[int, str]:
    """
    Return the CPUs that this process may use, each with the list of the hyperthreads of its core (Linux only).

    The kernel keeps the affinity of a process within the cpuset of its control group.
    """
    topology = root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    siblings = {int(path.parts[-3].removeprefix("cpu")): read_kernel_file(path) for path in topology}
    if root == Path("/") and hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        _, _, status = read_kernel_file(root / "proc/self/status").partition("Cpus_allowed_list:")
        allowed = _parse_cpus(status.partition("\n")[0]) or set(siblings)
    return {cpu: siblings.get(cpu, str(cpu)) for cpu in allowed}


def _parse_cpus(text: str) -> set[int]:
    """Parse a list of CPUs of the kernel: "0-3,8" lists 5."""
    cpus = set[int]()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return cpus


def _cpu_times(cpus: Set[int]) -> CpuTimes:
    """
    Read the times of `cpus`, or of all if there are none; takes 0.1 ms.

    Processes with a lower priority hardly slow this one down: their time counts as free. The share that a hypervisor
    withholds (steal) counts as well: fewer threads would not bring it back.
    """
    import psutil

    kinds = ["idle", "iowait", "steal"]
    if hasattr(os, "nice") and os.nice(0) <= 0:  # else "nice" includes this process
        kinds.append("nice")
    times = psutil.cpu_times(percpu=True)
    usable = [cpu for number, cpu in enumerate(times) if number in cpus] or times
    return CpuTimes(time.process_time(), sum(getattr(cpu, kind, 0.0) for cpu in usable for kind in kinds))


def _memory(root: Path) -> Memory:
    import psutil

    if root == Path("/"):
        state = psutil.virtual_memory()
        memory = Memory(int(state.total), int(state.available))
    else:
        lines = read_kernel_file(root / "proc/meminfo").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        memory = Memory(*(int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")))
    groups = read_memory_limits(root)
    total = min([memory.total, *(group.limit for group in groups)])
    return Memory(total, min([memory.available, *(group.available for group in groups)]))


def _memory_pressure(root: Path) -> float:
    """
    Read Linux's pressure stall information of the machine and the control groups, and return the worst one.

    "full avg10=12.50 avg60=…" means 0.125: https://docs.kernel.org/accounting/psi.html
    """
    worst = 0.0
    for path in (root / "proc/pressure/memory", *memory_pressure_files(root)):
        for line in read_kernel_file(path).splitlines():
            kind, _, rest = line.partition(" avg10=")
            share = rest.split(" ")[0]
            if kind == "full" and share.replace(".", "", 1).isdigit():
                worst = max(worst, float(share) / 100)
    return worst


def _cpuinfo(root: Path, *keys: str) -> str:
    """Return the value of the first line of /proc/cpuinfo that starts with one of `keys`; "" if there is none."""
    lines = read_kernel_file(root / "proc/cpuinfo").splitlines()
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
