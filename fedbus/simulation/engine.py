"""What the simulation needs of an engine: workers in other processes, and payloads that all of them read.

The messenger decides which worker handles which message. An engine carries orders to workers, events back, and says
which workers have died. What a worker does with an order is `fedbus.simulation.worker`, the same for each engine.

    messenger:  place(payload) ─▶ id      submit(worker, order) …      wait() ─▶ events      release(id)
    worker:     `SimulationWorker.handle(order, read)` ─▶ events

Orders of one worker are handled in the order of their submission, and its events arrive in the order in which it sent
them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from fedbus.contracts.run import RunPlan, Scalar
from fedbus.contracts.task.task import Task
from fedbus.learning.library import ReplyError
from fedbus.learning.payload import Payload
from fedbus.simulation.settings import client_name


class EngineFailed(RuntimeError):
    """The engine cannot continue. The text is the reason and what to do."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What a worker needs to open the sessions of clients. It is sent once, and can be pickled."""

    task: Task
    run: str
    plan: RunPlan
    clients: int
    """The number of virtual clients."""
    node_config: Mapping[str, Scalar]
    """The values that all clients share."""
    seed: int | None = None
    state_dir: Path | None = None
    """The directory for state of idle clients; None: it stays in memory."""
    memory_share: float = 1.0
    """The share of the machine's memory in use, above which the state of idle clients moves to *state_dir*."""

    def client_name(self, index: int) -> str:
        return client_name(index, self.clients)


# --- orders: to a worker ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageItem:
    """The part of a message that is the client's own."""

    number: int
    """The messenger's own number of the message."""
    client: int
    """The index of the client."""
    message_id: str
    state: bytes | None = None
    """The state of the client, if it moves to this worker."""


@dataclass(frozen=True, slots=True)
class MessageBatch:
    """Messages to clients of one worker, which share everything but the client."""

    items: Sequence[MessageItem]
    payload: int
    """The id of the payload, as `SimulationEngine.place` returned it."""
    kind: str
    round: int | None
    group_id: str
    ttl_s: float
    created_at: float


Order: TypeAlias = MessageBatch


# --- events: from a worker --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReply:
    """The reply to one message."""

    number: int
    """That of the `MessageItem`."""
    seconds: float
    """The time that the worker spent on the message."""
    train_s: float
    """The time in the task's code."""
    created_at: float
    ttl_s: float
    size: int | None
    """The size of its payload, in bytes; None if it has none."""
    error: ReplyError | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replies:
    """Replies of one worker."""

    worker: int
    replies: Sequence[WorkerReply]
    buffers: Sequence[bytes | memoryview]
    """The payloads of the replies, one after the other, cut anywhere into buffers. An engine does not pickle them."""

    def payloads(self) -> Iterator[tuple[WorkerReply, memoryview | None]]:
        """Yield each reply with its payload. Replies with payloads of one call share their memory."""
        whole = memoryview(self.buffers[0] if len(self.buffers) == 1 else b"".join(self.buffers)).cast("B")
        position = 0
        for reply in self.replies:
            if reply.size is None:
                yield reply, None
            else:
                yield reply, whole[position : position + reply.size]
                position += reply.size


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker has died. The orders that it has not answered are lost, and its clients' state."""

    worker: int
    reason: str
    """Why, in one line, with what to do."""


Event: TypeAlias = Replies | WorkerLost


# --- the engine -------------------------------------------------------------------------------


class SimulationEngine(Protocol):
    """Workers, numbered from 0. One thread at a time calls it, except `wake`."""

    @property
    def workers(self) -> int:
        """The number of workers."""

    def start(self) -> None:
        """Start the workers. They may still import the app when this returns.

        Raises:
            BadTask: the app cannot be imported.
            EngineFailed: the workers cannot be started.

        """

    def place(self, payload: Payload) -> int:
        """Make *payload* readable for all workers, and return its id. Raises EngineFailed."""

    def release(self, payload: int) -> None:
        """Free a payload. No submitted order needs it any more."""

    def submit(self, worker: int, order: Order) -> None:
        """Send *order* to a worker. This does not block."""

    def wait(self, timeout_s: float | None) -> list[Event]:
        """Block until there are events, `wake` is called, or the time is over, and return the events.

        A worker that dies is replaced at once by one with the same number, which has no sessions: `WorkerLost`.

        Raises:
            BadTask: the app cannot be imported.
            EngineFailed: the workers cannot be started.

        """

    def wake(self) -> None:
        """End the current or next `wait` at once. Any thread may call this."""

    def processes(self) -> list[int]:
        """Return the ids of the engine's processes on this machine, to measure their memory."""

    def close(self, *, at_once: bool = False) -> None:
        """End all workers. Sessions are closed first, unless *at_once*."""
