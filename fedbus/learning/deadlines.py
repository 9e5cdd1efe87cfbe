"""Deadlines by name, of which the earliest is known at any time."""

import heapq
from typing import Final

MIN_COMPACTED: Final = 64
"""A heap with so few entries is never compacted."""


class Deadlines:
    """A time for each of some names. To set one, to remove one and to read the earliest take O(log n), amortized.

    The heap keeps entries of times that have changed since. They are corrected or removed when they come first, and all
    together when they are the majority.
    """

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        """At least one entry for each name, which is not later than its time."""

    def set(self, name: str, time: float) -> None:
        """Set the time of *name*. A later time than before costs nothing until the old one comes first."""
        before = self._times.get(name)
        self._times[name] = time
        if before is None or time < before:
            if len(self._heap) > MIN_COMPACTED + 2 * len(self._times):
                self._compact()
            else:
                heapq.heappush(self._heap, (time, name))

    def remove(self, name: str) -> None:
        """Remove *name*, if it has a time."""
        self._times.pop(name, None)

    def earliest(self) -> float | None:
        """Return the earliest time; None if there is none."""
        while self._heap:
            time, name = self._heap[0]
            current = self._times.get(name)
            if current == time:
                return time
            if current is None or current < time:  # another entry of the name comes with its own time
                heapq.heappop(self._heap)
            else:
                heapq.heapreplace(self._heap, (current, name))
        return None

    def _compact(self) -> None:
        self._heap = [(time, name) for name, time in self._times.items()]
        heapq.heapify(self._heap)
