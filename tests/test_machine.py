"""Probes of the machine, with simulated file systems, and progress output."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from qwenlocal.engine.memory import ModelDims
from qwenlocal.ggml import list_devices
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


def test_a_containers_limit_applies_without_reclaimable_pages(tmp_path: Path) -> None:
    group = {
        "sys/fs/cgroup/memory.max": str(2 * GIB),
        "sys/fs/cgroup/memory.current": str(GIB),
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    }
    memory = simulate(tmp_path, MEMINFO | group).memory()
    assert (memory.total, memory.available) == (2 * GIB, 3 * GIB // 2)


def test_memory_pressure_is_the_worse_of_machine_and_container(tmp_path: Path) -> None:
    some = "some avg10=99.00 avg60=1.00 avg300=0.00 total=12\n"
    machine = simulate(tmp_path, {"proc/pressure/memory": some + "full avg10=12.50 avg60=1.00 avg300=0.00 total=9"})
    assert machine.memory_pressure() == 0.125
    simulate(tmp_path, {"sys/fs/cgroup/memory.pressure": some + "full avg10=40.00 avg60=1.00 avg300=0.00 total=9"})
    assert machine.memory_pressure() == 0.4


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


@pytest.mark.parametrize("quota", [{"sys/fs/cgroup/cpu.max": "200000 100000"}, {
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"
}])  # fmt: skip
def test_a_containers_cpu_quota_limits_the_cores(tmp_path: Path, quota: dict[str, str]) -> None:
    siblings = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": str(n) for n in range(8)}
    assert simulate(tmp_path, MEMINFO | siblings | quota).cores == 2


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
