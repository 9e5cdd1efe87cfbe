"""The interface between fedbus and a library for federated learning.

A task chooses its library with ``library = "…"`` in ``[tool.fedbus]``. fedbus owns the life of runs, clients, models
and code; the library trains. Messages between its server side and its client side are opaque to fedbus: a client, a
kind and bytes.

To add a library, implement `TrainingLibrary` as a class without constructor arguments, and name it in the entry-point
group ``fedbus.libraries`` of your package:

    [project.entry-points."fedbus.libraries"]
    my-library = "my_package.fedbus_library:MyLibrary"

Then run the suite of `fedbus.learning.conformance` on it.

Which process calls what:

    process                        calls, in order                                                 thread
    agents, command line           `read_app`                                                      any
    ``fedbus child check``         `check`, `initial_model`                                        main
    ``fedbus child init``          `initial_model`                                                 main
    ``fedbus child server``        `open_server`, `ServerSession.run`, `ServerSession.close`       main
    ``fedbus child trainer``       `open_client`, `ClientSession.handle` …, `ClientSession.close`  main

A child process exists for one purpose and has one session. Its event loop runs in another thread, so a session may
block as long as it needs, and may use signals, ``asyncio.run`` and processes of its own. A process may end without
`close` at any time: by SIGTERM, or when its parent dies. What must not outlive it must end with its process group.

Logging: libraries log to the root logger's handlers, which fedbus configures. If a dependency adds handlers of its own
when it is imported, the library removes them.

Only `read_app` runs in the agents. So a library imports its heavy dependencies in the other methods, not at the top
of the module with the `TrainingLibrary`.

Errors. Raise `BadTask` if the task's code is at fault before training starts (it cannot be imported, or it is of the
wrong type), `TrainingFailed` if a run cannot continue, `BadWeights` for invalid weights. Their text is one line with
the reason, which users read as the reason of the failed run. Any other exception is a fault of the library: it ends
the process with a traceback, and the run is recovered.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from fedbus.contracts.envelope import uuid7
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.task.aggregation import AggregationTable
from fedbus.contracts.task.app import AppReader
from fedbus.contracts.task.task import Task
from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.payload import Payload
from fedbus.learning.round_timing import ExchangeTiming
from fedbus.learning.weights import Arrays

MAX_REASON_CHARS: Final = 1000
"""The limit of the reason in an error reply."""
CAPTURED_DATA_KEY: Final = "captured-data"
"""The key of the node configuration with the path of the captured data."""

OnRound: TypeAlias = Callable[[RoundResult, Arrays], None]
"""Called after each round with its result and the global model. The model must not change afterwards."""


# --- errors -----------------------------------------------------------------------------------


class BadTask(Exception):
    """The task's code is invalid. The text is one line with the reason and the place."""


class TrainingFailed(RuntimeError):
    """The run cannot continue. The text is one line with the reason."""


class ModeUnsupported(TrainingFailed):
    """The aggregation mode of the run does not work with the app. The text has the reason, and what to do."""


class NotEnoughClients(TrainingFailed):
    """The run waited for more clients than are present. The text names those that are missing."""


class NoUpdates(TrainingFailed):
    """No client could train in any round. The text names the clients and the first reason."""


class MessengerClosed(RuntimeError):
    """The run has ended for this process. The text is the reason. A session lets it pass."""


# --- messages ---------------------------------------------------------------------------------


class ErrorCode(IntEnum):
    """Why a message has no result. A library may use other numbers for errors of its own."""

    UNKNOWN = 0
    LOAD_FAILED = 1
    """The client's code could not be imported."""
    CODE_RAISED = 2
    """The client's code raised."""
    MESSAGE_UNAVAILABLE = 3
    """The message or its reply could not be fetched, or the time to live of the message is over."""
    NO_REPLY = 4
    """No reply within the time limit of the call. It may still come."""
    CLIENT_LOST = 5
    """The client failed, left the run, or is silent."""


@dataclass(frozen=True)
class ReplyError:
    """An error instead of a result."""

    code: int
    """An `ErrorCode`, or the library's own number."""
    reason: str
    """One line."""
    kind: str = ""
    """A short name for metrics and traces, such as that of the exception type."""


@dataclass(frozen=True, kw_only=True)
class OutgoingMessage:
    """A message to one client. Messages with the same `Payload` object share one transfer."""

    client: str
    kind: str
    """``train``, ``evaluate`` or ``query``, or one of these with a suffix: ``train.distill``. Captured data of the
    device is offered to messages whose kind begins with ``train``."""
    payload: Payload
    round: int | None = None
    """The round that the message counts for; None is that of the last message with a round."""
    group_id: str = ""
    """The library's own; the client gets it unchanged."""
    ttl_s: float | None = None
    """The time to live, from *created_at*, in seconds; None is without a limit of the library's own."""
    created_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    message_id: str = field(default_factory=uuid7)
    sum: bytes | None = None
    """Asks to add the update to one sum with those of other messages of the call that have the same value, where the
    sessions of these clients are: what `SummingLibrary.open_sum` needs. Only if `Messenger.adds_updates`."""


@dataclass(frozen=True, kw_only=True)
class ClientReply:
    """The reply to *request*: *data*, or *error* if there is no result."""

    request: OutgoingMessage
    round: int
    """The round that the exchange counts for; 0 before the first round."""
    message_id: str = ""
    created_at: float = field(default_factory=time.time)
    ttl_s: float = 0.0
    data: bytes | memoryview | None = None
    """The bytes of the client's payload. Arrays that are views of it keep all of it in memory."""
    error: ReplyError | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics that the client reported."""
    timing: ExchangeTiming | None = None
    """None if there was no reply."""
    samples: int = 0
    """That of the `ClientResponse`, if the messenger knows it: those of a simulation do."""
    sum: bytes | memoryview | None = None
    """A sum of updates (`UpdateSum.take`), among them that of this reply. Each update that was added is in one sum."""

    @property
    def client(self) -> str:
        return self.request.client


@dataclass(frozen=True)
class RoundTally:
    """The participants of a round."""

    participants: dict[str, int] = field(default_factory=dict)
    """Samples by client."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons by client."""
    training_failures: dict[str, str] = field(default_factory=dict)
    """Those of *failures* whose message was to train."""
    evaluated: set[str] = field(default_factory=set)
    """The clients that evaluated the model."""
    evaluation_failures: dict[str, str] = field(default_factory=dict)
    """Those of *failures* whose message was to evaluate."""
    train_s: dict[str, float] = field(default_factory=dict)
    """Training time in seconds, by client."""
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics that the clients reported, by client."""
    exchanges: list[ExchangeTiming] = field(default_factory=list)
    """Times of each message and its reply, without those that failed."""


# --- server side ------------------------------------------------------------------------------


class Messenger(Protocol):
    """The messages of one run, on its server side. fedbus implements it: `fedbus.learning.messenger.BusMessenger`.

    Methods may be called from all threads except that of the event loop. Each raises MessengerClosed once the run has
    ended, also while it waits.
    """

    @property
    def run(self) -> str:
        """The name of the run."""

    @property
    def plan(self) -> RunPlan: ...

    @property
    def has_open_messages(self) -> bool:
        """Whether a message has no reply yet."""

    @property
    def adds_updates(self) -> bool:
        """Whether `OutgoingMessage.sum` is allowed: several sessions are in one process, as in a simulation."""

    def now(self) -> float:
        """Return the time in seconds on the messenger's clock, which is virtual in a simulation.

        All limits of the messenger's calls count on this clock.
        """

    def clients(self) -> list[str]:
        """Return the clients that are present. A client that is silent or failed is not."""

    def failed_clients(self) -> dict[str, str]:
        """Return the reasons of the clients that failed and have not joined again, by client."""

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        """Block until at least *count* clients are present, and return those that are.

        The limit is *timeout_s* seconds; None is the plan's recruiting time.

        Raises:
            NotEnoughClients: the time is over. It is a TrainingFailed, and names the clients that are missing.

        """

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        """Block until the present clients differ from *clients*, at most *timeout_s*. Return those present then."""

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> "Iterator[ClientReply]":
        """Send *messages*, and yield exactly one reply for each, in order of arrival.

        This blocks until the messages are published; each step of the iterator blocks until the next reply. At most
        `reply_queue.MAX_PREFETCHED_REPLIES` replies with blobs are in memory before they are taken: take them one by
        one, and release them. A message without a reply within *timeout_s*, the plan's ``round_s`` and its time to
        live, or whose client leaves, yields a `ClientReply` with an error. Nothing raises because of a client. A reply
        that comes after *timeout_s* can be collected.
        """

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        """Send *messages* without waiting for replies, and return their ids for `collect`."""

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        """Return the replies to *message_ids* that have arrived, each once. This blocks for their transfer only."""

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        """Block until the reply to a message of `post` arrives, and return it: each once, in order of arrival.

        A message without a reply within the plan's ``round_s`` and its time to live, or whose client leaves, yields a
        `ClientReply` with an error. The result is None after *timeout_s* seconds, also if no message waits for a
        reply; and before, as soon as the present clients differ from *clients*, unless a reply has arrived.
        """

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        """Record that *reply* counts for its round, with the number of samples that the client trained on.

        Call this once for each valid reply, in any thread. Replies with an error are recorded without it.
        """

    def reject(self, reply: ClientReply, reason: str) -> None:
        """Record that *reply* is useless, for example because it cannot be decoded: a failure of its client."""

    def tally(self, round_number: int) -> RoundTally:
        """Return the participants of the round so far. `RoundLog` makes a `RoundResult` of it."""


@dataclass(frozen=True, kw_only=True)
class ServerJob:
    """The input of a run's server side."""

    task: Task
    """Its ``app`` has the references by role as `read_app` returned them, ``path`` is the task's directory."""
    run: str
    plan: RunPlan
    model: Arrays
    """The stored model; the checkpoint of the round before *first_round* if a lost run resumes. It is empty if the
    task has none: then the run begins with what the app itself begins with."""
    first_round: int = 1
    """Greater than 1 if a lost run resumes. Rounds keep their numbers."""
    selection: ClientSelection = field(default_factory=ClientSelection)
    """The clients that train in a round, and the weight of their updates, by ``[tool.fedbus.selection]``."""

    @property
    def path(self) -> Path:
        return Path(self.task.path)

    @property
    def config(self) -> dict[str, Scalar]:
        """The app's run configuration with the overrides of this run."""
        return {**self.task.run_config, **self.plan.config}

    @property
    def aggregation(self) -> AggregationTable:
        """The task's ``[tool.fedbus.aggregation]`` with the overrides of this run. Raises BadTask."""
        try:
            return self.task.table.aggregation.override(self.plan.aggregation)
        except ValueError as error:
            raise BadTask(f"the aggregation of the run does not fit the task: {error}") from None


class ServerSession(Protocol):
    """The server side of one run, in its own process."""

    def run(self, messenger: Messenger, on_round: OnRound) -> Arrays | None:
        """Train, and return the final model; None if the run ends without one, for example with metrics only.

        The call begins when the quorum has joined. It calls *on_round* after each round from ``job.first_round`` on;
        a run that is not resumed may call it before with round 0, the evaluation of the stored model. *on_round*
        blocks while the previous round's model is still being stored, and raises if that failed: let it pass.

        Raises:
            TrainingFailed: the run cannot continue, for example since the app raised.
            BadWeights: the stored model does not fit the app, or the app's result is invalid.
            MessengerClosed: the run was ended from outside.

        """

    def close(self) -> None:
        """Release what the session holds, such as processes. Called once, after `run` or instead of it."""


# --- client side ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClientJob:
    """The input of a run's client side."""

    task: Task
    client: str
    run: str
    plan: RunPlan = field(default_factory=RunPlan)
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """The device's own values, such as ``partition-id`` and ``num-partitions``."""

    @property
    def path(self) -> Path:
        return Path(self.task.path)

    @property
    def config(self) -> dict[str, Scalar]:
        """The app's run configuration with the overrides of this run."""
        return {**self.task.run_config, **self.plan.config}


@dataclass(frozen=True, kw_only=True)
class IncomingMessage:
    """A message of the server side, as the client gets it."""

    message_id: str
    kind: str
    data: bytes | memoryview
    """The bytes of the payload. They stay valid until `ClientSession.handle` returns and longer."""
    round: int | None = None
    group_id: str = ""
    ttl_s: float = 3600.0
    created_at: float = field(default_factory=time.time)
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """That of the job, and ``captured-data``, the path of an .npz file with ``inputs`` and ``labels``, if the device
    has captured data and the message trains."""
    cache: MutableMapping[str, Any] | None = None
    """Where a library may keep what it has made of *data*, for the messages of other clients with the same data in this
    process. One client must not be able to change what another one gets. None: there are no others."""


@dataclass(frozen=True, kw_only=True)
class ClientResponse:
    """The answer to an `IncomingMessage`: *payload*, or *error*."""

    payload: Payload | None = None
    """None without an error: all that the server side needs of the answer is in the sum of `handle_in_sum`."""
    error: ReplyError | None = None
    """Errors of the task's code are answers, not exceptions; the client stays in the run."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By their common names with the prefix of the phase: ``train_loss``, ``eval_accuracy``. See
    `fedbus.learning.round_metrics`."""
    train_s: float | None = None
    """The time in the task's code; None is that of `ClientSession.handle`."""
    samples: int = 0
    """The number of samples that the client trained or evaluated with; 0 if it is not known."""
    created_at: float = field(default_factory=time.time)
    ttl_s: float | None = None
    """None is that of the message."""


class ClientSession(Protocol):
    """The client side of one run on one device, in its own process. It keeps the app's state between messages."""

    def handle(self, message: IncomingMessage) -> ClientResponse:
        """Answer *message*. This blocks as long as the training. Messages come one at a time.

        An error of the task's code (also SystemExit) becomes a `ClientResponse` with an error. An exception is a
        fault of the library: it ends the process, and this client fails.
        """

    def close(self) -> None:
        """Release what the session holds. Called once, after the last `handle`."""


# --- client side: optional, for many clients in one process -----------------------------------


class StateNotMovable(Exception):
    """The state of a session cannot leave it, for example since it cannot be pickled. The text is one line."""


@runtime_checkable
class MovableSession(ClientSession, Protocol):
    """A session whose state can move to another session of the same client, in another process or later.

    A session without these methods stays where it is. They are called between messages.
    """

    @property
    def has_state(self) -> bool:
        """Whether there is state that a new session would not have. Cheap."""

    def dump_state(self) -> bytes | None:
        """Return the state; None if there is none. Raises StateNotMovable."""

    def load_state(self, state: bytes) -> None:
        """Set the state of a session that has not handled a message to one that `dump_state` has returned."""


class UpdateSum(Protocol):
    """A sum of the updates of clients, with their weights."""

    def take(self) -> Payload | None:
        """Return the sum of the updates since the last call, and begin a new one; None if there was none."""


@runtime_checkable
class SummingSession(ClientSession, Protocol):
    """A session that can add its update to a sum, instead of returning it."""

    def handle_in_sum(self, message: IncomingMessage, update_sum: UpdateSum) -> ClientResponse:
        """Answer *message* as `handle` does, add the update to *update_sum*, and return the response without it.

        *update_sum* is one that `SummingLibrary.open_sum` has returned in this process. An update that cannot be added
        is an error of its client.
        """


# --- the library ------------------------------------------------------------------------------


class TrainingLibrary(AppReader, Protocol):
    """A library for federated learning. `open_library` constructs one object for a process, without arguments."""

    @property
    def packages(self) -> Sequence[str]:
        """The distributions whose versions a bug report names: ``("numpy",)``."""

    def check(self, task: Task, *, server_side: bool) -> None:
        """Import the code of *task*: that of the clients, and with *server_side* that of the server. Raises BadTask."""

    def initial_model(self, task: Task) -> Arrays | None:
        """Build the first model if the app declares one itself. Raises BadTask, BadWeights.

        It is not called for a task whose ``[tool.fedbus]`` names a model builder. None means that the app's first run
        makes the first model.
        """

    def open_server(self, job: ServerJob) -> ServerSession:
        """Import the app's server side, before clients join. Raises BadTask."""

    def open_client(self, job: ClientJob) -> ClientSession:
        """Import the app's client side, before the client joins. Raises BadTask."""


@runtime_checkable
class SummingLibrary(Protocol):
    """What a library has in addition if updates can be added up where several sessions are in one process.

    Its server side then sets `OutgoingMessage.sum` if `Messenger.adds_updates`, reads `ClientReply.sum`, and gets the
    replies of these messages without the updates. Its sessions are `SummingSession`.
    """

    def open_sum(self, request: bytes) -> UpdateSum:
        """Return an empty sum for the messages whose `OutgoingMessage.sum` is *request*."""
