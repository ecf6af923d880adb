"""The number of threads while other processes compute, with simulated processor times."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.threads import ThreadAdapter
from qwenlocal.machine import CpuTimes, this_machine


class SimulatedProcessor:
    """A clock, and the processor times of a process that always gets what `use` says."""

    def __init__(self) -> None:
        self.time = self.used = self.free = 0.0

    def pass_time(self, seconds: float, *, used: float, free: float) -> None:
        """Let time pass in which the process uses `used` CPUs and `free` CPUs are idle."""
        self.time, self.used, self.free = self.time + seconds, self.used + used * seconds, self.free + free * seconds

    def adapter(self, limit: int) -> ThreadAdapter:
        return ThreadAdapter(limit, lambda: CpuTimes(self.used, self.free), lambda: self.time)


def test_an_idle_machine_is_used_in_full() -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(4)
    assert adapter.update() == 4
    processor.pass_time(1, used=3.9, free=4.0)
    assert adapter.update() == 4


def test_a_core_that_another_process_uses_is_left_to_it() -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(2)
    processor.pass_time(0.6, used=1.33, free=0.0)  # three busy threads on two cores
    assert adapter.update() == 1
    processor.pass_time(0.6, used=1.0, free=0.0)
    assert adapter.update() == 1


def test_the_core_is_used_again_within_a_second_after_the_other_process_ends() -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(2)
    processor.pass_time(1, used=1.0, free=0.0)
    assert adapter.update() == 1
    processor.pass_time(0.5, used=1.0, free=1.0)
    assert adapter.update() == 2


def test_a_background_process_that_uses_a_third_of_a_core_changes_nothing() -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(2)
    processor.pass_time(1, used=1.67, free=0.0)
    assert adapter.update() == 2


def test_hyperthreads_that_are_free_leave_room_for_others() -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(4)
    processor.pass_time(1, used=4.0, free=2.0)  # of 8 logical CPUs, others use 2
    assert adapter.update() == 4


def test_the_times_are_read_at_most_twice_per_second() -> None:
    reads = 0

    def cpu_times() -> CpuTimes:
        nonlocal reads
        reads += 1
        return CpuTimes(0, 2 * reads)

    now = [0.0]
    adapter = ThreadAdapter(2, cpu_times, lambda: now[0])
    for step in range(1000):
        now[0] = step / 1000
        adapter.update()
    assert reads == 2


@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 128), st.floats(-1, 128)), max_size=20),
)
def test_the_number_is_always_between_one_and_the_limit(limit: int, steps: list[tuple[float, float, float]]) -> None:
    processor = SimulatedProcessor()
    adapter = processor.adapter(limit)
    for seconds, used, free in steps:
        processor.pass_time(seconds, used=used, free=free)
        assert 1 <= adapter.update() <= limit


def test_a_context_computes_with_the_number_that_the_adapter_gives(random_model: Path) -> None:
    processor = SimulatedProcessor()
    model = Model(random_model)
    context = Context(model, ContextOptions(256, threads=2), thread_adapter=processor.adapter(2))
    counts = []
    for used in (2.0, 1.0, 2.0):
        processor.pass_time(1, used=used, free=0.0)
        context.decode([(0, [1])])
        counts.append(context.threads)
    assert counts == [2, 1, 2]
    context.close()
    model.close()


@pytest.mark.parametrize("field", ["used", "free"])
def test_this_machine_has_processor_times(field: str) -> None:
    cpu_times = this_machine().cpu_times
    assert cpu_times
    before = getattr(cpu_times(), field)
    sum(range(2_000_000))
    assert getattr(cpu_times(), field) >= before
