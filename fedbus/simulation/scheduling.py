"""Which worker handles which message next: pure decisions, from measured durations.

- A client is sticky: its messages go to the worker that has its session, so that its state and data stay there.
- Within a worker, the longest expected message comes first. A worker without work of its own takes the shortest
  message of the worker with the most work left, if the client can move.
- A worker gets as many messages at once as keep it busy for a moment, so that it never waits for the next one. Towards
  the end of a round the moment becomes shorter, and the work is divided more finely.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

MIN_WINDOW_S: Final = 0.01
MAX_WINDOW_S: Final = 0.1
"""Limits of the expected time of the messages that a worker has got and not answered."""
MAX_IN_FLIGHT: Final = 512
"""Messages that a worker has got and not answered."""
UNKNOWN_S: Final = MAX_WINDOW_S / 2
"""The expected time of a message before anything is measured."""
SMOOTHING: Final = 0.5
"""The weight of the newest measurement of a client."""
PINNED_SLACK_S: Final = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """One message to be handled."""

    number: int
    client: int
    kind: str
    position: int = 0
    """The position among the messages of its call, which is the order of handling if that is fixed."""
    expected_s: float = UNKNOWN_S
    worker: int = -1
    """The worker that has it; -1 while it waits."""


@dataclass
class _WorkerQueue:
    waiting: deque[Job] = field(default_factory=deque)
    waiting_s: float = 0.0
    in_flight: dict[int, Job] = field(default_factory=dict)
    in_flight_s: float = 0.0

    @property
    def load_s(self) -> float:
        return self.waiting_s + self.in_flight_s


class Schedule:
    """The jobs of a simulation, and the worker of each client.

    With *in_order*, jobs are handled by their position, and at most *max_ahead* positions ahead of the first job that
    is not finished.
    """

    def __init__(self, workers: int, *, in_order: bool = False, max_ahead: int = 256) -> None:
        self._queues = [_WorkerQueue() for _ in range(workers)]
        self._homes: dict[int, int] = {}
        self._in_order = in_order
        self._max_ahead = max_ahead
        self._durations: dict[tuple[int, str], float] = {}
        self._means: dict[str, float] = {}
        self._unfinished: dict[int, int] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no job waits or is handled."""
        return not any(queue.waiting or queue.in_flight for queue in self._queues)

    def home_of(self, client: int) -> int | None:
        """Return the worker with the session of *client*; None if it has none."""
        return self._homes.get(client)

    def expected_s(self, client: int, kind: str) -> float:
        """Return the expected duration: the client's own measurements, else the mean of the kind."""
        own = self._durations.get((client, kind))
        return own if own is not None else self._means.get(kind, UNKNOWN_S)

    def add(self, jobs: Iterable[Job]) -> None:
        """Add the jobs of one call."""
        new = list(jobs)
        for job in new:
            job.expected_s = self.expected_s(job.client, job.kind)
        if not self._in_order:
            new.sort(key=lambda job: -job.expected_s)
        loads = [queue.load_s for queue in self._queues]
        touched = set()
        for job in new:
            home = self._homes.get(job.client)
            if home is None:
                home = loads.index(min(loads))
                self._homes[job.client] = home
            loads[home] += job.expected_s
            queue = self._queues[home]
            queue.waiting.append(job)
            queue.waiting_s += job.expected_s
            touched.add(home)

    def take(self, worker: int) -> list[Job]:
        """Take the jobs that *worker* gets now; it may be none."""
        queue = self._queues[worker]
        left_s = sum(one.load_s for one in self._queues) / len(self._queues)
        window_s = min(MAX_WINDOW_S, max(MIN_WINDOW_S, left_s / 4))
        taken: list[Job] = []
        if queue.in_flight and queue.in_flight_s > window_s / 2:
            return taken
        while not queue.in_flight or (queue.in_flight_s < window_s and len(queue.in_flight) < MAX_IN_FLIGHT):
            job = self._pop(worker)
            if job is None:
                break
            job.worker = worker
            queue.in_flight[job.number] = job
            queue.in_flight_s += job.expected_s
            taken.append(job)
        return taken

    def finish(self, number: int, worker: int, seconds: float) -> None:
        """Record that a job took *seconds*."""
        queue = self._queues[worker]
        job = queue.in_flight.pop(number)
        queue.in_flight_s = queue.in_flight_s - job.expected_s if queue.in_flight else 0.0
        key = (job.client, job.kind)
        before = self._durations.get(key)
        self._durations[key] = seconds if before is None else before + SMOOTHING * (seconds - before)
        mean = self._means.get(job.kind)
        self._means[job.kind] = seconds if mean is None else mean + 0.1 * (seconds - mean)

    def lose(self, worker: int) -> list[Job]:
        """Forget the sessions of a worker that has died. Return the jobs that it had got."""
        queue = self._queues[worker]
        lost = list(queue.in_flight.values())
        queue.in_flight.clear()
        queue.in_flight_s = 0.0
        return lost

    def clients_of(self, worker: int) -> list[int]:
        """Return the clients whose sessions *worker* has."""
        return [client for client, home in self._homes.items() if home == worker]

    def _pop(self, worker: int) -> Job | None:
        queue = self._queues[worker]
        if not queue.waiting:
            return None
        job = queue.waiting.popleft()
        queue.waiting_s = queue.waiting_s - job.expected_s if queue.waiting else 0.0
        return job
