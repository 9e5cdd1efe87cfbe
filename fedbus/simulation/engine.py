"""What the simulation needs of an engine: workers in other processes, and payloads that all of them read.

The messenger decides which worker handles which message. An engine carries orders to workers and events back, and
reports which workers have died. What a worker does with an order is in `fedbus.simulation.worker`, for all engines.

    messenger:  place(payload) ─▶ id      submit(worker, order) …      wait() ─▶ events      release(id)
    worker:     `SimulationWorker.handle(order, read)` ─▶ events

Orders of one worker are handled in the order of their submission, and its events arrive in the order in which it sent
them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

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


class MessageItem(NamedTuple):
    """The part of a message that is the client's own."""

    number: int
    """The messenger's own number of the message."""
    client: int
    """The index of the client."""
    message_id: str
    state: bytes | None = None
    """The state of the client, if it moves to this worker."""


@dataclass(frozen=True, slots=True)
class SumRequest:
    """A sum of updates in each worker, for the messages of one call."""

    number: int
    """The messenger's own number of the call."""
    request: bytes
    """`OutgoingMessage.sum`, for `SummingLibrary.open_sum`."""


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
    sum: SumRequest | None = None
    """The sum to which the updates are added; None: each reply has its own."""


@dataclass(frozen=True, slots=True)
class EndSum:
    """Asks for the rest of the sum of this `SumRequest`: no more messages follow for it."""

    number: int


@dataclass(frozen=True, slots=True)
class TakeState:
    """Asks for the state of a client, which moves to another worker. Its session is closed."""

    client: int


@dataclass(frozen=True, slots=True)
class DiscardClient:
    """Closes the session of a client without state, which moves to another worker."""

    client: int


@dataclass(frozen=True, slots=True)
class ReleasePayload:
    """No later order has this payload."""

    payload: int


Order: TypeAlias = MessageBatch | EndSum | TakeState | DiscardClient | ReleasePayload


# --- events: from a worker --------------------------------------------------------------------


class WorkerReply(NamedTuple):
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
    metrics: Mapping[str, float] = {}
    has_state: bool = True
    """Whether the client has state in its session now."""
    samples: int = 0
    """Those of `ClientResponse`."""


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
class SumTaken:
    """The sum of the updates of all replies to a `SumRequest` that the worker has sent since its last sum of it."""

    worker: int
    number: int
    """That of the `SumRequest`."""
    size: int | None
    """The size of the sum, in bytes; None: there was no update."""
    buffers: Sequence[bytes | memoryview]
    """An engine does not pickle them."""

    def payload(self) -> bytes | memoryview | None:
        if self.size is None:
            return None
        return self.buffers[0] if len(self.buffers) == 1 else b"".join(self.buffers)


@dataclass(frozen=True, slots=True)
class StateTaken:
    """The answer to `TakeState`."""

    worker: int
    client: int
    state: bytes | None = None
    """None if there is none."""
    is_movable: bool = True
    """False: the state cannot leave the session, which stays where it is."""


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker handles orders from now on."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker has died. The orders that it has not answered are lost, and its clients' state."""

    worker: int
    reason: str
    """Why, in one line, with what to do."""


Event: TypeAlias = Replies | SumTaken | StateTaken | WorkerStarted | WorkerLost


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

    def kill(self, worker: int) -> None:
        """Kill a worker that does not answer. `wait` returns its `WorkerLost`."""

    def wake(self) -> None:
        """End the current or next `wait` at once. Any thread may call this."""

    def processes(self) -> list[int]:
        """Return the ids of the engine's processes on this machine, to measure their memory."""

    def close(self, *, at_once: bool = False) -> None:
        """End all workers. Sessions are closed first, unless *at_once*."""
