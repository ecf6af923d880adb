"""Probes of the machine, with simulated file systems, and progress output."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwenlocal.devices import list_devices
from qwenlocal.engine.memory import ModelDims
from qwenlocal.machine import Machine, this_machine
from qwenlocal.progress import TaskProgress
from qwenlocal.terminal.ansi import escape_controls
from qwenlocal.terminal.progress import PlainProgress, show_progress

GIB = 2**30
HALF = ModelDims(n_layers=24, n_kv_heads=16, head_dim=64, n_ctx_train=32768)  # Qwen1.5-0.5B
SEVEN = ModelDims(n_layers=32, n_kv_heads=32, head_dim=128, n_ctx_train=32768)  # Qwen1.5-7B


def simulate(root: Path, files: dict[str, str]) -> Machine:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return this_machine(root)


MEMINFO = {"proc/meminfo": "MemTotal:       8388608 kB\nMemFree:   100 kB\nMemAvailable:   3145728 kB\n"}


def test_available_memory_includes_reclaimable_pages(tmp_path: Path) -> None:
    memory = simulate(tmp_path, MEMINFO).memory()
    assert (memory.total, memory.available) == (8 * GIB, 3 * GIB)


@dataclass(frozen=True)
class GroupTree:
    """The control groups of a process: lines of /proc, and files of the groups by their paths below /sys/fs/cgroup."""

    mounts: str
    path: str
    files: dict[str, str]

    @property
    def in_root(self) -> dict[str, str]:
        files = {f"sys/fs/cgroup/{name}": text for name, text in self.files.items()}
        return {"proc/self/mountinfo": self.mounts, "proc/self/cgroup": self.path, **files}


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
DISK = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
NO_LIMIT = "9223372036854771712"  # what version 1 shows
SCOPE = "user.slice/user-1000.slice/run-u7.scope"
MIB = 2**20
MEMORY_TREES = {
    "a container that sees its own group": GroupTree(V2, "0::/", {
        "memory.max": f"{2 * GIB}", "memory.current": f"{GIB}", "memory.stat": f"anon 5\ninactive_file {GIB // 2}",
    }),
    "active pages and reclaimable slab": GroupTree(V2, "0::/", {
        "memory.max": f"{2 * GIB}", "memory.current": f"{GIB}",
        "memory.stat": f"active_file {GIB // 4}\ninactive_file 0\nslab_reclaimable {GIB // 4}\nslab {GIB // 2}",
    }),
    "a systemd scope": GroupTree(DISK + V2, f"0::/{SCOPE}", {
        f"{SCOPE}/memory.max": f"{2 * GIB}", f"{SCOPE}/memory.current": f"{GIB // 2}", "memory.stat": "anon 7",
    }),
    "a limit of the group above": GroupTree(V2, f"0::/{SCOPE}", {
        f"{SCOPE}/memory.max": "max", f"{SCOPE}/memory.current": "4096",
        "user.slice/memory.max": f"{2 * GIB}", "user.slice/memory.current": f"{GIB}",
        "user.slice/memory.stat": f"active_file {GIB // 2}",
    }),
    "the lowest of several limits": GroupTree(V2, f"0::/{SCOPE}", {
        f"{SCOPE}/memory.max": f"{4 * GIB}", f"{SCOPE}/memory.current": "0",
        "user.slice/memory.max": f"{2 * GIB}", "user.slice/memory.current": f"{GIB // 2}",
    }),
    "memory.high": GroupTree(V2, "0::/", {
        "memory.max": "max", "memory.high": f"{2 * GIB}", "memory.current": f"{GIB // 2}",
    }),
    "version 1": GroupTree(V1_MEMORY, "4:memory:/docker/8f\n0::/", {
        "memory/docker/8f/memory.limit_in_bytes": f"{2 * GIB}", "memory/docker/8f/memory.usage_in_bytes": f"{GIB}",
        "memory/docker/8f/memory.stat": f"active_file 1\ntotal_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}",
        "memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": f"{7 * GIB}",
    }),
    "version 1 in a container": GroupTree(V1_MEMORY.replace(" / ", " /docker/8f "), "4:memory:/docker/8f\n", {
        "memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": f"{GIB // 2}",
    }),
    "version 1 under a hidden limit": GroupTree(V1_MEMORY.replace(" / ", " /pod/8f "), "4:memory:/pod/8f\n", {
        "memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": f"{GIB // 2}",
        "memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}",
    }),
    "a hybrid": GroupTree(V1_MEMORY + V2.replace("cgroup rw", "cgroup/unified rw"), "4:memory:/a\n0::/b\n", {
        "memory/a/memory.limit_in_bytes": f"{2 * GIB}", "memory/a/memory.usage_in_bytes": f"{GIB // 2}",
        "unified/b/cgroup.procs": "1",
    }),
    "another mount point": GroupTree(V2.replace("cgroup rw", "cgroup/my\\040groups rw"), "0::/a:b", {
        "my groups/a:b/memory.max": f"{2 * GIB}", "my groups/a:b/memory.current": f"{GIB // 2}",
    }),
    "a process outside of the namespace": GroupTree(V2, "0::/../other", {
        "memory.max": f"{2 * GIB}", "memory.current": f"{GIB // 2}",
    }),
    "a second mount of other groups": GroupTree(V2.replace(" / /sys", " /other /sys/fs/cgroup") + V2, "0::/me", {
        "me/memory.max": f"{2 * GIB}", "me/memory.current": f"{GIB // 2}",
        "fs/cgroup/memory.max": "1", "fs/cgroup/memory.current": "1",
    }),
}  # fmt: skip


@pytest.mark.parametrize("tree", MEMORY_TREES.values(), ids=MEMORY_TREES)
def test_the_memory_limits_of_all_groups_apply(tmp_path: Path, tree: GroupTree) -> None:
    memory = simulate(tmp_path, MEMINFO | tree.in_root).memory()
    assert (memory.total, memory.available) == (2 * GIB, 3 * GIB // 2)


UNLIMITED_TREES = {
    "no control groups": GroupTree(DISK, "", {}),
    "the root group": GroupTree(V2, "0::/", {"memory.stat": "anon 5"}),
    "groups without limits": GroupTree(V2 + V1_MEMORY, f"0::/{SCOPE}\n4:memory:/", {
        f"{SCOPE}/memory.max": "max", f"{SCOPE}/memory.current": "99",
        "memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": f"{7 * GIB}",
        "cpu.max": "max 100000",
    }),
    "limits of other groups": GroupTree(V2, f"0::/{SCOPE}", {"system.slice/memory.max": "1", "cpu/cpu.max": "1 2"}),
    "limits above what is free": GroupTree(V2, "0::/", {"memory.max": f"{99 * GIB}", "memory.current": "0"}),
    "unreadable files": GroupTree("nonsense - \n" + V2, "nonsense\n0::/", {"memory.max": "x", "memory.stat": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("tree", UNLIMITED_TREES.values(), ids=UNLIMITED_TREES)
def test_groups_without_limits_change_nothing(tmp_path: Path, tree: GroupTree) -> None:
    machine = simulate(tmp_path, MEMINFO | topology(8) | tree.in_root)
    assert (machine.memory().total, machine.memory().available) == (8 * GIB, 3 * GIB)
    assert (machine.cores, machine.logical_cores) == (8, 8)


def test_a_full_group_has_no_memory_available(tmp_path: Path) -> None:
    tree = GroupTree(V2, "0::/", {"memory.max": f"{GIB}", "memory.current": f"{GIB + 1}"})
    assert simulate(tmp_path, MEMINFO | tree.in_root).memory().available == 0


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="no version 1 groups to write to")
def test_the_limit_of_a_real_group_applies(tmp_path: Path) -> None:
    """Pages of a file that was just read count as available."""
    (path,) = (line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().split("\n") if ":memory:" in line)
    group = Path(f"/sys/fs/cgroup/memory{path}/qwenlocal-{os.getpid()}")
    group.mkdir()
    (tmp_path / "model").write_bytes(bytes(100 * MIB))
    script = f"""
import os, pathlib
pathlib.Path("{group}/cgroup.procs").write_text(str(os.getpid()))
with open("{tmp_path}/model", "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(2):
        file.seek(0)
        while file.read(1 << 20): pass
from qwenlocal.machine import this_machine
memory = this_machine().memory()
print(memory.total, memory.available, *pathlib.Path("{group}/memory.usage_in_bytes").read_text().split())
"""
    try:
        (group / "memory.limit_in_bytes").write_text(f"{400 * MIB}")
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    finally:
        group.rmdir()
    total, available, used = map(int, result.stdout.split())
    assert total == 400 * MIB
    assert 300 * MIB < available < 400 * MIB
    assert available > total - used


def test_memory_pressure_is_the_worst_of_machine_and_groups(tmp_path: Path) -> None:
    some = "some avg10=99.00 avg60=1.00 avg300=0.00 total=12\n"
    machine = simulate(tmp_path, {"proc/pressure/memory": some + "full avg10=12.50 avg60=1.00 avg300=0.00 total=9"})
    assert machine.memory_pressure() == 0.125
    for path, share in ((f"{SCOPE}/memory.pressure", 0.4), ("user.slice/memory.pressure", 0.5)):
        pressure = f"{some}full avg10={share:.2%}".removesuffix("%") + " avg60=1.00 avg300=0.00 total=9"
        simulate(tmp_path, GroupTree(V2, f"0::/{SCOPE}", {path: pressure}).in_root)
        assert machine.memory_pressure() == share


def test_unknown_memory_pressure_is_zero(tmp_path: Path) -> None:
    assert simulate(tmp_path, {"proc/pressure/memory": "full nonsense"}).memory_pressure() == 0.0
    assert simulate(tmp_path / "other", {}).memory_pressure() == 0.0


def test_hyperthreads_do_not_count_as_cores(tmp_path: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}" for n in range(4)
    }
    assert simulate(tmp_path, MEMINFO | siblings).cores == 2


def test_efficiency_cores_do_not_count(tmp_path: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}"
        for n in range(8)
    }
    slow = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": str(n) for n in range(8, 16)}
    assert simulate(tmp_path, MEMINFO | siblings | slow | {"sys/devices/cpu_core/cpus": "0-7"}).cores == 4


def topology(count: int) -> dict[str, str]:
    """Return the files that describe cores without hyperthreads."""
    return {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": str(n) for n in range(count)}


CPU_TREES = {
    "version 2": GroupTree(V2, "0::/", {"cpu.max": "200000 100000"}),
    "a part of a processor": GroupTree(V2, "0::/", {"cpu.max": "290000 100000"}),
    "a systemd scope": GroupTree(V2, f"0::/{SCOPE}", {f"{SCOPE}/cpu.max": "200000 100000"}),
    "the group above": GroupTree(V2, f"0::/{SCOPE}", {
        f"{SCOPE}/cpu.max": "max 100000", "user.slice/cpu.max": "100000 50000", "cpu.max": "400000 100000",
    }),
    "version 1": GroupTree(V1_CPU, "3:cpu,cpuacct:/a/b\n", {
        "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/a/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    }),
    "version 1 in a container": GroupTree(V1_CPU.replace(" / ", " /a/b "), "3:cpu,cpuacct:/a/b\n", {
        "cpu,cpuacct/cpu.cfs_quota_us": "20000", "cpu,cpuacct/cpu.cfs_period_us": "10000",
    }),
}  # fmt: skip


@pytest.mark.parametrize("tree", CPU_TREES.values(), ids=CPU_TREES)
def test_the_cpu_quotas_of_all_groups_limit_the_cores(tmp_path: Path, tree: GroupTree) -> None:
    machine = simulate(tmp_path, MEMINFO | topology(8) | tree.in_root)
    assert (machine.cores, machine.logical_cores) == (2, 2)


def test_a_quota_below_one_processor_leaves_one_core(tmp_path: Path) -> None:
    tree = GroupTree(V2, "0::/", {"cpu.max": "5000 100000"})
    assert simulate(tmp_path, MEMINFO | topology(8) | tree.in_root).cores == 1


@pytest.mark.parametrize(
    ("allowed", "cores", "logical_cores"),
    [("0-3", 4, 4), ("0-1,4-5", 2, 4), ("6", 1, 1), ("0-7", 4, 8), ("8-15", 8, 8), ("6-15", 2, 10)],
)
def test_only_processors_that_the_process_may_use_count(
    tmp_path: Path, allowed: str, cores: int, logical_cores: int
) -> None:
    """Four performance cores with hyperthreads (0 and 4, 1 and 5, ...) and eight efficiency cores."""
    files = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)}
    status = {"proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{allowed}\nMems_allowed:\t1\n"}
    machine = simulate(tmp_path, MEMINFO | topology(16) | files | status | {"sys/devices/cpu_core/cpus": "0-7"})
    assert (machine.cores, machine.logical_cores) == (cores, logical_cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity")
def test_the_affinity_of_the_process_limits_the_cores() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert (this_machine().cores, this_machine().logical_cores) == (1, 1)
    finally:
        os.sched_setaffinity(0, allowed)


def test_only_relevant_cpu_features_are_listed(tmp_path: Path) -> None:
    info = {"proc/cpuinfo": "model name\t: Old Laptop\nflags\t\t: fpu avx f16c mmx\n"}
    machine = simulate(tmp_path, MEMINFO | info)
    assert machine.processor == "Old Laptop"
    assert machine.features == {"avx", "f16c"}


def test_this_machine_has_a_core_and_some_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert 0 < machine.memory().available <= machine.memory().total


def test_ggml_lists_the_cpu_as_a_device() -> None:
    (cpu,) = [device for device in list_devices() if not device.is_gpu][:1]
    assert cpu.total > 0


# --- memory


def test_kv_cache_size_of_known_models() -> None:
    assert HALF.kv_cache_bytes(2048) == 192 * 2**20
    assert SEVEN.kv_cache_bytes(1) == 512 * 1024


def test_dimensions_are_read_from_metadata() -> None:
    keys = {
        "general.architecture": "qwen2",
        "qwen2.block_count": 24,
        "qwen2.embedding_length": 896,
        "qwen2.attention.head_count": 14,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.context_length": 32768,
    }
    assert ModelDims.from_metadata(keys) == ModelDims(24, 2, 64, 32768, 896, 4 * 896, 14)
    assert ModelDims.from_metadata({"general.architecture": "odd"}) is None


# --- output


def test_plain_progress_prints_a_line_every_few_seconds_and_one_at_the_end() -> None:
    ticks = iter([0.0, 1.0, 6.0, 6.0, 7.0, 8.0])
    out = io.StringIO()
    with contextlib.closing(PlainProgress(out, clock=lambda: next(ticks))) as show:
        show(TaskProgress("x", 0, 10_000_000, "downloading"))
        show(TaskProgress("x", 5_000_000, 10_000_000, "downloading"))
        show(TaskProgress("x", 10_000_000, 10_000_000, "downloading"))
    first, last = out.getvalue().splitlines()
    assert first == "downloading x: 50% of 10 MB, 0.8 MB/s, 6 s left"
    assert last.startswith("downloading x: 100% of 10 MB")


def test_a_pipe_gets_plain_lines() -> None:
    with show_progress(io.StringIO()) as show:
        assert isinstance(show, PlainProgress)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "␛[2J"),
        ("\x07\x7f", "␇␡"),
        ("\x9b1m", "\ufffd1m"),
        ("你好 👋🏽 عربى", "你好 👋🏽 عربى"),
    ],
)
def test_control_characters_are_shown_not_obeyed(text: str, shown: str) -> None:
    assert escape_controls(text) == shown
