"""
The number of threads while other processes compute.

llama.cpp's threads wait for each other after every operation. If one of them shares its core with another process, all
of them are as slow as that one, and the other cores spend the time waiting. One thread less is faster then
(benchmarks/README.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from qwenlocal.machine import CpuTimes

_INTERVAL = 0.5  # seconds between two looks at the processor times, which have a resolution of 10 ms


class ThreadAdapter:
    """
    Chooses the number of threads: at most `limit`, and no more than there are free cores.

    With a limit of 4 on 4 CPUs: if this process used 3.2 of them in the last half second and 0.1 were free, `update`
    returns 3.
    """

    def __init__(
        self, limit: int, cpu_times: Callable[[], CpuTimes], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._cpu_times, self._clock = limit, cpu_times, clock
        self._count = limit
        self._time, self._times = clock(), cpu_times()

    def update(self) -> int:
        """Return the number of threads for the next computation; changes at most twice per second."""
        now = self._clock()
        if (elapsed := now - self._time) >= _INTERVAL:
            times = self._cpu_times()
            cpus = (times.used + times.free - self._times.used - self._times.free) / elapsed
            self._count = max(1, min(self._limit, round(cpus)))
            self._time, self._times = now, times
        return self._count
