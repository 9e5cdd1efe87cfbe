"""Which worker handles which message next: pure decisions, from measured durations.

- A client is sticky: its messages go to the worker that has its session, so that its state and data stay there. When
  messages are added and the workers are out of balance, clients move to the worker with the least work.
- Within a worker, the longest expected message comes first. A worker without work of its own takes the shortest message
  of the worker with the most work left, if the client has no state.
- A worker gets as many messages at once as keep it busy for a moment, so that it never waits for the next one. Towards
  the end of a round the moment becomes shorter, and the work is divided more finely.
- Messages to one client are handled in the order in which they were added.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

MIN_WINDOW_S: Final = 0.01
MAX_WINDOW_S: Final = 0.1
"""Limits of the expected time of the messages that a worker has got and not answered."""
MAX_IN_FLIGHT: Final = 512
"""The limit of the messages that a worker has got and not answered."""
UNKNOWN_S: Final = MAX_WINDOW_S / 2
"""The expected time of a message before anything is measured."""
SMOOTHING: Final = 0.5
"""The weight of the newest measurement of a client."""
MEAN_SMOOTHING: Final = 0.1
BALANCE_SHARE: Final = 0.05
"""Clients move if the loads of two workers differ by more than this share of the mean load."""
MIN_BALANCE_S: Final = 0.02
MIN_STEAL_S: Final = 0.005
"""A worker takes messages of another one that has at least so much work. With less, a move costs more than it wins."""
MOVE_GAIN: Final = 4
"""A client with a session moves to a worker without work if that begins its message so many times sooner than the time
of the client's first message, which another worker needs again."""
STEAL_SCAN: Final = 32
"""The number of messages of another worker that are considered."""


@dataclass(slots=True, eq=False)
class Job:
    """One message to be handled."""

    number: int
    client: int
    kind: str
    position: int = 0
    """The position among the messages of its call, which is the order of handling if that is fixed."""
    expected_s: float = UNKNOWN_S
    is_guess: bool = False
    """Whether the expected time is not one of this client."""
    call: int = 0
    """The call that it belongs to."""
    is_suspect: bool = False
    """Whether a worker died that had it: it is handled alone, to find out whether it was the reason."""


@dataclass(frozen=True, slots=True)
class Move:
    """A client moves from one worker to another. Its session there is to be closed."""

    client: int
    origin: int
    has_state: bool


@dataclass
class _WorkerQueue:
    waiting: deque[Job] = field(default_factory=deque)
    waiting_s: float = 0.0
    in_flight: dict[int, Job] = field(default_factory=dict)
    in_flight_s: float = 0.0

    @property
    def load_s(self) -> float:
        return self.waiting_s + self.in_flight_s

    def push(self, job: Job) -> None:
        self.waiting.append(job)
        self.waiting_s += job.expected_s

    def push_first(self, job: Job, *, in_order: bool) -> None:
        index = sum(one.number < job.number for one in self.waiting) if in_order else 0
        self.waiting.insert(index, job)
        self.waiting_s += job.expected_s

    def remove(self, job: Job) -> None:
        self.waiting.remove(job)
        self._subtract(job)

    def pop(self) -> Job:
        job = self.waiting.popleft()
        self._subtract(job)
        return job

    def _subtract(self, job: Job) -> None:
        self.waiting_s = self.waiting_s - job.expected_s if self.waiting else 0.0


class Schedule:
    """The jobs of a simulation, and the worker of each client.

    With *in_order*, jobs are handled by their position, and at most *max_ahead* positions ahead of the first job of the
    call that is not finished, so that few replies wait for an earlier one.
    """

    def __init__(self, workers: int, *, in_order: bool = False, max_ahead: int = 64) -> None:
        self._queues = [_WorkerQueue() for _ in range(workers)]
        self._homes: dict[int, int] = {}
        self._stateful: set[int] = set()
        self._pinned: set[int] = set()
        """Clients whose state cannot move."""
        self._opened: set[int] = set()
        """Clients that have a session."""
        self._in_order = in_order
        self._max_ahead = max_ahead
        self._unfinished_positions: dict[int, set[int]] = {}
        """The positions without a reply, by call."""
        self._first_unfinished: dict[int, int] = {}
        self._durations: dict[tuple[int, str], float] = {}
        self._means: dict[str, float] = {}
        self._first_s: dict[int, float] = {}
        """The time of a client's first message, with the opening of its session and the loading of its data."""
        self._jobs_of_client: Counter[int] = Counter()
        self._waiting_of_call: Counter[int] = Counter()
        self._held: dict[int, list[Job]] = {}
        """Jobs of clients whose state is on its way, by client."""
        self._origins: dict[int, int] = {}
        """The worker from which the state of a client comes, by client."""
        self._moves: list[Move] = []

    # --- questions ----------------------------------------------------------------------------

    def expected_s(self, client: int, kind: str) -> float:
        """Return the expected duration: the client's own measurements, else the mean of the kind."""
        own = self._durations.get((client, kind))
        return own if own is not None else self._means.get(kind, UNKNOWN_S)

    def has_waiting(self, call: int) -> bool:
        """Return whether a job of *call* has not been taken by a worker."""
        return self._waiting_of_call[call] > 0

    def oldest_in_flight(self, worker: int) -> int | None:
        """Return the number of the job that *worker* handles now; None if it has none."""
        return next(iter(self._queues[worker].in_flight), None)

    def take_moves(self) -> list[Move]:
        """Return the moves since the last call. The orders for them come before those of the jobs."""
        moves, self._moves = self._moves, []
        return moves

    # --- jobs ---------------------------------------------------------------------------------

    def add(self, jobs: Iterable[Job], *, is_first: bool = False) -> None:
        """Add jobs; with *is_first*, before those that wait: a dead worker had them."""
        new = list(jobs)
        longest: dict[int, float] = {}
        for job in new:
            job.expected_s = self.expected_s(job.client, job.kind)
            job.is_guess = (job.client, job.kind) not in self._durations
            longest[job.client] = max(job.expected_s, longest.get(job.client, 0.0))
            self._jobs_of_client[job.client] += 1
            self._waiting_of_call[job.call] += 1
            if self._in_order:
                self._unfinished_positions.setdefault(job.call, set()).add(job.position)
                first = self._first_unfinished.get(job.call, job.position)
                self._first_unfinished[job.call] = min(first, job.position)
        if not self._in_order:
            new.sort(key=lambda job: -longest[job.client])
        self._assign(new)
        if is_first:
            self._put_first(new)
        else:
            for job in new:
                if job.client in self._held:
                    self._held[job.client].append(job)
                else:
                    self._queues[self._homes[job.client]].push(job)

    def _put_first(self, jobs: list[Job]) -> None:
        """Put *jobs* before those that wait; with a fixed order, by their number, so that the first one may start."""
        for job in reversed(jobs):
            if job.client in self._held:
                self._held[job.client].insert(0, job)
            else:
                self._queues[self._homes[job.client]].push_first(job, in_order=self._in_order)

    def take(self, worker: int) -> list[Job]:
        """Take the jobs that *worker* gets now; it may be none."""
        queue = self._queues[worker]
        left_s = sum(one.load_s for one in self._queues) / len(self._queues)
        window_s = min(MAX_WINDOW_S, max(MIN_WINDOW_S, left_s / 4))
        taken: list[Job] = []
        if queue.in_flight and queue.in_flight_s > window_s / 4:
            return taken
        while not queue.in_flight or (queue.in_flight_s < window_s and len(queue.in_flight) < MAX_IN_FLIGHT):
            if queue.in_flight and self._is_alone(queue):
                break
            job = self._next(worker)
            if job is None:
                break
            if job.is_guess:
                job.expected_s = self._means.get(job.kind, job.expected_s)
            queue.in_flight[job.number] = job
            queue.in_flight_s += job.expected_s
            self._waiting_of_call[job.call] -= 1
            taken.append(job)
        return taken

    @staticmethod
    def _is_alone(queue: _WorkerQueue) -> bool:
        """Return whether the next job or the last one is a suspect, so that they are not handed out together."""
        last = next(reversed(queue.in_flight.values()))
        return last.is_suspect or bool(queue.waiting and queue.waiting[0].is_suspect)

    def finish(self, number: int, worker: int, seconds: float, *, has_state: bool) -> None:
        """Record that a job took *seconds*, and whether its client has state now."""
        queue = self._queues[worker]
        job = queue.in_flight.pop(number)
        queue.in_flight_s = queue.in_flight_s - job.expected_s if queue.in_flight else 0.0
        self._first_s.setdefault(job.client, seconds)
        key = (job.client, job.kind)
        before = self._durations.get(key)
        self._durations[key] = seconds if before is None else before + SMOOTHING * (seconds - before)
        mean = self._means.get(job.kind)
        self._means[job.kind] = seconds if mean is None else mean + MEAN_SMOOTHING * (seconds - mean)
        self._opened.add(job.client)
        if has_state:
            self._stateful.add(job.client)
        else:
            self._stateful.discard(job.client)
        self._end(job)

    def lose(self, worker: int) -> tuple[list[Job], list[int]]:
        """Record that a worker has died. Return the jobs that it had got, and the clients whose state is lost.

        The state of a client that moves to the worker is not lost: it is elsewhere until the client has a reply.
        """
        queue = self._queues[worker]
        lost = list(queue.in_flight.values())
        queue.in_flight.clear()
        queue.in_flight_s = 0.0
        opened = [client for client in self._opened if self._homes[client] == worker]
        leaving = [client for client, origin in self._origins.items() if origin == worker]
        clients = sorted(self._stateful & {*opened, *leaving})
        self._opened.difference_update(opened)
        self._stateful.difference_update(clients)
        self._moves = [move for move in self._moves if move.origin != worker]
        for client in leaving:
            self.arrive(client, is_moved=True, origin=worker)
        for job in lost:
            job.is_suspect = True
            self._end(job)
        return lost, clients

    def cancel(self, call: int) -> list[Job]:
        """Remove and return the jobs of *call* that no worker has taken."""
        cancelled = []
        for queue in self._queues:
            for job in [job for job in queue.waiting if job.call == call]:
                queue.remove(job)
                cancelled.append(job)
        for jobs in self._held.values():
            for job in [job for job in jobs if job.call == call]:
                jobs.remove(job)
                cancelled.append(job)
        for job in cancelled:
            self._waiting_of_call[call] -= 1
            self._end(job)
        return cancelled

    # --- moves --------------------------------------------------------------------------------

    def arrive(self, client: int, *, is_moved: bool, origin: int) -> None:
        """Record that the state of a moving client has arrived, or that it stays at *origin*."""
        if not is_moved:
            self._homes[client] = origin
            self._opened.add(client)
            self._stateful.add(client)
            self._pinned.add(client)
        self._origins.pop(client, None)
        self._put_first(self._held.pop(client, []))

    def _assign(self, jobs: list[Job]) -> None:
        """Give each client of *jobs* a worker, and move clients from workers with much work to those with little."""
        loads = [queue.load_s for queue in self._queues]
        by_worker: list[list[Job]] = [[] for _ in self._queues]
        unassigned = []
        for job in jobs:
            home = self._homes.get(job.client)
            if home is None:
                unassigned.append(job)
            else:
                loads[home] += job.expected_s
                by_worker[home].append(job)
        for job in unassigned:
            home = self._homes.get(job.client)
            if home is None:
                home = self._homes[job.client] = loads.index(min(loads))
            loads[home] += job.expected_s
        limit_s = max(MIN_BALANCE_S, BALANCE_SHARE * sum(loads) / len(loads))
        for most in sorted(range(len(loads)), key=lambda worker: -loads[worker]):
            # clients without state first, then the longest jobs first
            candidates = sorted(by_worker[most], key=lambda job: job.client in self._stateful)
            for job in candidates:
                least = loads.index(min(loads))
                gap_s = loads[most] - loads[least]
                if gap_s <= limit_s:
                    break
                is_free = job.client not in self._pinned and self._jobs_of_client[job.client] == 1
                if is_free and job.expected_s < gap_s / 2 + limit_s / 4:
                    self._move(job.client, least)
                    loads[most] -= job.expected_s
                    loads[least] += job.expected_s

    def _move(self, client: int, worker: int) -> None:
        """Move a client without jobs in a queue. Its jobs wait if it has state."""
        origin = self._homes[client]
        self._homes[client] = worker
        if client in self._opened:
            has_state = client in self._stateful
            self._moves.append(Move(client, origin, has_state))
            self._opened.discard(client)
            if has_state:
                self._held[client] = []
                self._origins[client] = origin

    def _next(self, worker: int) -> Job | None:
        queue = self._queues[worker]
        if queue.waiting:
            job = queue.waiting[0]
            return queue.pop() if self._may_start(job) else None
        return self._steal(worker)

    def _may_start(self, job: Job) -> bool:
        return not self._in_order or job.position < self._first_unfinished[job.call] + self._max_ahead

    def _steal(self, worker: int) -> Job | None:
        """Take the last job of the worker with the most waiting work, whose client has no state and no other job."""
        victim = max(self._queues, key=lambda queue: queue.waiting_s if queue.waiting else -1.0)
        if victim.waiting_s < MIN_STEAL_S:
            return None
        for index in range(1, min(len(victim.waiting), STEAL_SCAN) + 1):
            job = victim.waiting[-index]
            if (
                job.client in self._opened
                and MOVE_GAIN * self._first_s.get(job.client, 0.0) > victim.waiting_s
            ):
                continue
            if job.is_suspect and self._queues[worker].in_flight:
                continue
            if job.client not in self._stateful and self._jobs_of_client[job.client] == 1:
                if not self._may_start(job):
                    return None
                victim.remove(job)
                self._move(job.client, worker)
                return job
        return None

    def _end(self, job: Job) -> None:
        self._jobs_of_client[job.client] -= 1
        if not self._jobs_of_client[job.client]:
            del self._jobs_of_client[job.client]
        positions = self._unfinished_positions.get(job.call)
        if positions is not None:
            positions.discard(job.position)
            if not positions:
                del self._unfinished_positions[job.call], self._first_unfinished[job.call]
            else:
                first = self._first_unfinished[job.call]
                while first not in positions:
                    first += 1
                self._first_unfinished[job.call] = first
