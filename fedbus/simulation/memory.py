"""The memory of the processes of a simulation: the largest sum that was measured."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

MIN_INTERVAL_S: Final = 5.0
COST_RATIO: Final = 200
"""Measuring takes at most this part of the time: one in two hundred."""


class PeakMemory:
    """Measures the memory of this process and of *processes*, whose ids it returns."""

    def __init__(self, processes: Callable[[], Iterable[int]]) -> None:
        self._processes = processes
        self._next = 0.0
        self.peak_bytes = 0

    def measure(self, *, now: bool = False) -> None:
        """Measure, unless the last time was a moment ago."""
        start = time.monotonic()
        if start < self._next and not now:
            return
        own = psutil.Process().pid
        self.peak_bytes = max(self.peak_bytes, sum(map(memory_of, {own, *self._processes()})))
        end = time.monotonic()
        self._next = end + max(MIN_INTERVAL_S, COST_RATIO * (end - start))


def memory_of(pid: int) -> int:
    """Return the memory of a process in bytes; its share of what it shares with others (Linux), else all of it."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
