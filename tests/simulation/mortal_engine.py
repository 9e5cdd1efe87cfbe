"""An engine whose workers are in this process and die when a test wants it, and a library that records what they do."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

from fedbus.learning.library import ClientJob, ClientResponse, IncomingMessage, UpdateSum
from fedbus.learning.payload import Payload
from fedbus.simulation.engine import (
    Event,
    MessageBatch,
    MessageItem,
    Order,
    Replies,
    StateTaken,
    WorkerJob,
    WorkerLost,
    WorkerReply,
    WorkerStarted,
)
from fedbus.simulation.worker import SimulationWorker

CLIENTS = 6
STATELESS = 5
"""The client without state."""


# --- a training library whose state and sums are lists of message ids -------------------------


class IdSum:
    """A sum of updates: the ids of their messages."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def take(self) -> Payload | None:
        ids, self.ids = self.ids, []
        return Payload.pack([json.dumps(ids).encode()]) if ids else None


class IdSession:
    """A session whose state is the ids of the messages that it has handled."""

    def __init__(self, process: "WorkerProcess", client: int) -> None:
        self.ids: list[str] = []
        self._process = process
        self._client = client
        process.sessions[client] = self

    def handle(self, message: IncomingMessage) -> ClientResponse:
        self._process.check_handling(self._client, self.ids, message.message_id)
        self.ids.append(message.message_id)
        return ClientResponse(payload=Payload.pack([message.message_id.encode()]))

    def handle_in_sum(self, message: IncomingMessage, update_sum: UpdateSum) -> ClientResponse:
        assert isinstance(update_sum, IdSum)
        self.handle(message)
        update_sum.ids.append(message.message_id)
        return ClientResponse()

    @property
    def has_state(self) -> bool:
        return bool(self.ids) and self._client != STATELESS

    def dump_state(self) -> bytes | None:
        return json.dumps(self.ids).encode() if self.has_state else None

    def load_state(self, state: bytes) -> None:
        self.ids = json.loads(state)

    def close(self) -> None:
        del self._process.sessions[self._client]


class WorkerProcess:
    """A worker, its orders and its events. It is the library of its sessions, too."""

    def __init__(self, engine: "MortalEngine", number: int, job: WorkerJob) -> None:
        self.sessions: dict[int, IdSession] = {}
        self.orders: deque[Order] = deque()
        self.events: deque[Event] = deque([WorkerStarted(number)])
        self._engine = engine
        with patch("fedbus.simulation.worker.open_library", lambda _name: self):
            self._worker = SimulationWorker(number, job)
        self._handling: Iterator[Event] | None = None

    def open_client(self, job: ClientJob) -> IdSession:
        return IdSession(self, int(job.client.removeprefix("client-")))

    def open_sum(self, request: bytes) -> IdSum:
        return IdSum()

    def check_handling(self, client: int, ids: list[str], message_id: str) -> None:
        self._engine.check_handling(self, client, ids, message_id)

    @property
    def is_idle(self) -> bool:
        return not self.orders and self._handling is None

    @property
    def gets_state(self) -> bool:
        """Whether the state of a client is on its way to it."""
        batches = [order for order in self.orders if isinstance(order, MessageBatch)]
        return any(item.state is not None for batch in batches for item in batch.items)

    def work(self) -> None:
        """Handle orders until there is another event."""
        if self._handling is None and self.orders:
            order = self.orders.popleft()
            data = b"x" if isinstance(order, MessageBatch) else b""
            self._handling = iter(self._worker.handle(order, data))
        if self._handling is not None:
            event = next(self._handling, None)
            if event is None:
                self._handling = None
            else:
                self.events.append(event)


# --- an engine whose workers die when the test wants it ---------------------------------------


@dataclass(frozen=True)
class WorkerStep:
    """A step of the simulation: what happens while the messenger waits for events."""

    action: str
    """``work``, ``deliver``, ``die``, ``send`` or ``detach``."""
    worker: int
    count: int
    """The events that arrive."""


class MortalEngine:
    """Workers of this process that follow *steps*, then live until all is handled.

    It knows the ids that each state must contain: those of the messages with a reply since a worker died with it.
    """

    def __init__(
        self,
        job: WorkerJob,
        workers: int,
        steps: list[WorkerStep],
        seconds: list[float],
        deaths_of_receivers: int = 0,
    ) -> None:
        self._job = job
        self._steps = deque(steps)
        self._seconds = deque(seconds)
        self._deaths_of_receivers = deaths_of_receivers
        self.processes_by_number = [WorkerProcess(self, number, job) for number in range(workers)]
        self.actions: dict[str, Callable[[], None]] = {}
        self._items: dict[int, MessageItem] = {}
        self.replied_ids: dict[int, list[str]] = {}
        """By client."""
        self._homes: dict[int, int] = {}
        """The worker that has had the state of a client at its last reply; none while the messenger has it."""
        self.losses: list[int] = []
        """The clients that have lost their state, by death of a worker."""
        self._turn = 0

    @property
    def workers(self) -> int:
        return len(self.processes_by_number)

    def place(self, payload: Payload) -> int:
        return 1

    def release(self, payload: int) -> None: ...

    def wake(self) -> None: ...

    def submit(self, worker: int, order: Order) -> None:
        self.processes_by_number[worker].orders.append(order)
        if isinstance(order, MessageBatch):
            self._items |= {item.number: item for item in order.items}

    def wait(self, timeout_s: float | None) -> list[Event]:
        for number, process in enumerate(self.processes_by_number):
            if process.gets_state and self._deaths_of_receivers:
                self._deaths_of_receivers -= 1
                return self._die(number, 0)
        if not self._steps:
            return self._go_on()
        step = self._steps.popleft()
        number = step.worker % self.workers
        process = self.processes_by_number[number]
        match step.action:
            case "work":
                process.work()
            case "deliver":
                return self._deliver(process, step.count)
            case "die":
                return self._die(number, step.count)
            case action:
                self.actions[action]()
        return []

    def _die(self, number: int, count: int) -> list[Event]:
        events = self._deliver(self.processes_by_number[number], count)
        self.processes_by_number[number] = WorkerProcess(self, number, self._job)
        lost = [client for client, home in self._homes.items() if home == number]
        self.losses.append(len(lost))
        for client in lost:
            del self._homes[client], self.replied_ids[client]
        return [*events, WorkerLost(number, "worker died")]

    def _go_on(self) -> list[Event]:
        """Let one worker after the other work."""
        processes = self.processes_by_number
        assert any(one.events or not one.is_idle for one in processes), "nothing can happen any more"
        self._turn += 1
        process = processes[self._turn % len(processes)]
        process.work()
        return self._deliver(process, 100)

    def _deliver(self, process: WorkerProcess, count: int) -> list[Event]:
        events = [process.events.popleft() for _ in range(min(count, len(process.events)))]
        return [self._arrive(event) for event in events]

    def _arrive(self, event: Event) -> Event:
        match event:
            case Replies():
                return replace(event, replies=[self._reply(event.worker, reply) for reply in event.replies])
            case StateTaken():
                self._homes.pop(event.client, None)
            case _:
                pass
        return event

    def _reply(self, worker: int, reply: WorkerReply) -> WorkerReply:
        item = self._items[reply.number]
        assert reply.error is None
        if reply.has_state:
            self.replied_ids.setdefault(item.client, []).append(item.message_id)
            self._homes[item.client] = worker
        self._seconds.rotate()
        return reply._replace(seconds=self._seconds[0])

    def check_handling(self, process: WorkerProcess, client: int, ids: list[str], message_id: str) -> None:
        """Check that the state of *client* is complete and the only one when it gets its next message."""
        assert [*ids, message_id] == sorted({*ids, message_id}), "each once, and in order"
        if client != STATELESS:
            expected = self.replied_ids.get(client, [])
            assert ids[: len(expected)] == expected
            others = [one for one in self.processes_by_number if one is not process]
            assert not [one for one in others if client in one.sessions and one.sessions[client].has_state]

    def check_end(self, arrived: dict[int, bytes]) -> None:
        """Check that each state is in one place: a worker, or *arrived* at the messenger."""
        sessions = [one for process in self.processes_by_number for one in process.sessions.items()]
        states = [(client, session.ids) for client, session in sessions if session.has_state]
        states += [(client, json.loads(state)) for client, state in arrived.items()]
        assert sorted(states) == sorted(self.replied_ids.items())
