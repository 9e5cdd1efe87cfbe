"""The current state of a federation, folded from its transitions and messages.

    view = FederationView()
    view.apply(transition, at=published_at, sequence=812)    a message of a stream, with its stream sequence
    view.apply(report, at=received_at)                       a heartbeat or device report, which no stream numbers
    view.clients["c1", "mnist"].training                     the last transition of the client's training

The stream sequence is the order: of each entity the transition with the highest sequence is its state. Two laws follow.
A message that a stream delivers again does not change the view, and a snapshot (the last message of each subject) gives
the same state as the whole stream.

Memory grows with the number of entities, not of messages. Finished runs and the history have a limit.
"""

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, assert_never

from fedbus.contracts.client import (
    ClientData,
    ClientDeclined,
    ClientJoined,
    ClientState,
    FailTrain,
    FlClientData,
    FlClientState,
    Heartbeat,
    InferenceData,
    InferenceState,
    RoundReply,
)
from fedbus.contracts.code import CodeData
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import ClientMessage, Family, LifecycleData, Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import RUN, RunData, RunState
from fedbus.contracts.scheduling import ScheduleData
from fedbus.contracts.server import ServerData, ServerEvent
from fedbus.contracts.transition import Transition

MAX_FINISHED_RUNS: Final = 1_000
"""Finished runs that a view remembers by default; it forgets the one that finished first."""
FINAL_RUN_STATES: Final = RUN.final

ClientKey: TypeAlias = tuple[str, str]
"""A client and a task."""
Participation: TypeAlias = ClientJoined | ClientDeclined | FailTrain
PARTICIPATION_MESSAGES: Final[tuple[type[Message], ...]] = (ClientJoined, ClientDeclined, FailTrain)
"""The messages that show whether a client takes part in a run; of each client the last one counts."""

KeyT = TypeVar("KeyT")
DataT = TypeVar("DataT", bound=LifecycleData)
DataT_co = TypeVar("DataT_co", bound=LifecycleData, covariant=True)
MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class Sequenced(Protocol):
    """A value from a stream."""

    @property
    def sequence(self) -> int: ...


SequencedT = TypeVar("SequencedT", bound=Sequenced)


class Latest(dict[KeyT, SequencedT]):
    """Of each key the value with the highest stream sequence."""

    def offer(self, key: KeyT, value: SequencedT) -> bool:
        """Store *value* unless the key already has it or a newer one; return whether it was stored."""
        if not is_newer(value, self.get(key)):
            return False
        self[key] = value
        return True


def is_newer(value: Sequenced, known: Sequenced | None) -> bool:
    """Return whether *value* comes after *known* in their stream."""
    return known is None or value.sequence > known.sequence


@dataclass(frozen=True, slots=True)
class EntityState(Generic[DataT_co]):
    """An entity as its last transition left it."""

    transition: Transition
    data: DataT_co
    at: datetime
    """When the owner published the transition, by the owner's clock."""
    sequence: int

    @property
    def state(self) -> str:
        return self.transition.target

    @property
    def reason(self) -> str:
        return self.transition.reason


@dataclass(frozen=True, slots=True)
class ReceivedMessage(Generic[MessageT_co]):
    """A message and its place in the events stream."""

    message: MessageT_co
    at: datetime
    sequence: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The last report of a device."""

    report: DeviceReport
    at: datetime


@dataclass(slots=True)
class RoundProgress:
    """The last kind of message that a run sent to its clients, and the replies to it."""

    run: str
    round: int
    message_type: str
    sequence: int
    """The stream sequence of the first of these messages."""
    requested: dict[str, str] = field(default_factory=dict)
    """The client of each message, by message id."""
    answered: set[str] = field(default_factory=set)
    """The ids of the messages that have a reply."""

    @property
    def pending_clients(self) -> list[str]:
        """The clients whose reply is missing, sorted."""
        return sorted(client for key, client in self.requested.items() if key not in self.answered)

    def is_about(self, message: RoundMessage) -> bool:
        return (self.run, self.round, self.message_type) == _phase(message)


def _phase(message: RoundMessage) -> tuple[str, int, str]:
    return message.run, message.round or 0, message.message_type


@dataclass(slots=True)
class ClientView:
    """One client in one task: the last transition of its three lifecycles, and its last participation message."""

    client: str
    task: str
    manager: EntityState[ClientData] | None = None
    training: EntityState[FlClientData] | None = None
    inference: EntityState[InferenceData] | None = None
    participation: ReceivedMessage[Participation] | None = None

    @property
    def lifecycles(self) -> list[EntityState[ClientData | FlClientData | InferenceData]]:
        """Those that have a transition, in a fixed order."""
        return [one for one in (self.manager, self.training, self.inference) if one is not None]

    @property
    def state(self) -> str:
        """The state of the client manager; empty before its first transition, as in the next two."""
        return self.manager.state if self.manager else ""

    @property
    def training_state(self) -> str:
        return self.training.state if self.training else ""

    @property
    def inference_state(self) -> str:
        return self.inference.state if self.inference else ""

    @property
    def is_training(self) -> bool:
        return self.training_state in (FlClientState.PENDING, FlClientState.TRAINING)

    @property
    def is_settled(self) -> bool:
        """Whether the client does nothing else than to serve predictions, if code of the task serves its model."""
        return (
            self.state == ClientState.SERVING
            and (self.inference_state == InferenceState.SERVING or self.not_served != "")
            and self.training_state in ("", FlClientState.WAITING)
        )

    @property
    def served_model(self) -> ModelRef | None:
        """The model that answers predictions."""
        return self.inference.data.model if self.inference else None

    @property
    def not_served(self) -> str:
        """Why the model that the client has taken is not served; empty if it is. An older one may be served."""
        if self.inference is not None and self.inference.data.not_served:
            return self.inference.data.not_served
        return self.manager.data.not_served if self.manager else ""

    @property
    def taken_model(self) -> ModelRef | None:
        """The model that the client has taken: the one that it serves, or a newer one that no code serves."""
        return self.manager.data.model if self.not_served and self.manager else self.served_model

    @property
    def model_version(self) -> int | None:
        """The version that answers predictions; before there is one, the version that the client is about to serve."""
        model = self.served_model or (self.manager.data.model if self.manager else None)
        return model.version if model else None

    @property
    def code_version(self) -> str:
        return self.manager.data.code_version if self.manager else ""

    @property
    def endpoint(self) -> str:
        return self.inference.data.endpoint if self.inference else ""

    @property
    def run(self) -> str | None:
        """The run that the client trains in."""
        if self.manager and self.manager.data.run:
            return self.manager.data.run
        return self.training.data.run if self.training else None

    @property
    def refusal(self) -> ClientDeclined | FailTrain | None:
        """Why the client is not in its last run; None if it has joined a run since."""
        message = self.participation.message if self.participation else None
        return None if isinstance(message, ClientJoined) else message


class Presence:
    """When each client was last seen, and the last report of its device."""

    def __init__(self) -> None:
        self.last_seen: dict[str, datetime] = {}
        self.devices: dict[str, DeviceState] = {}
        """By client."""
        self.reports: dict[ClientKey, DeviceState] = {}

    def apply(self, message: Message, at: datetime) -> bool:
        """Record that the sender of *message* was there; return whether *message* is a device report.

        Heartbeats and reports are not in a stream: the last one received counts, also when its time is older, because
        a device may correct its clock. Apply stored reports before the messages of the streams.
        """
        match message:
            case DeviceReport(client=client, task=task):
                state = DeviceState(message, at)
                self.devices[client] = self.reports[client, task] = state
                self.last_seen[client] = at
                return True
            case Heartbeat(client=client):
                self.last_seen[client] = at
            case _ if client := _sending_client(message):
                self.last_seen[client] = max(at, self.last_seen.get(client, at))
            case _:
                pass
        return False


def _sending_client(message: Message) -> str:
    """Return the client that published *message*; empty if the server side or a user did."""
    match message:
        case Transition(facts=ClientData() | FlClientData() | InferenceData() as data):
            return data.client
        case ClientMessage(client=client) if message.family in (Family.CLIENT, Family.LOCAL):
            return client
        case _:
            return ""


class FederationView:
    """Servers, code versions, schedules, runs, clients and devices of one federation as they are now.

    Args:
        max_finished_runs: The finished runs to remember.
        max_history: The applied transitions to remember in `history`.

    """

    def __init__(self, *, max_finished_runs: int = MAX_FINISHED_RUNS, max_history: int = 0) -> None:
        self.servers: Latest[str, EntityState[ServerData]] = Latest()
        """By task, as are codes, schedules and rounds."""
        self.codes: Latest[str, EntityState[CodeData]] = Latest()
        self.schedules: Latest[str, EntityState[ScheduleData]] = Latest()
        self.runs: Latest[str, EntityState[RunData]] = Latest()
        self.rounds: dict[str, RoundProgress] = {}
        """The current round of the task's run; it stays after the run has finished."""
        self.clients: dict[ClientKey, ClientView] = {}
        self.presence = Presence()
        self.history: deque[EntityState[LifecycleData]] = deque(maxlen=max_history)
        """The last transitions in the order in which they were applied."""
        self._max_finished_runs = max_finished_runs
        self._finished_runs: dict[str, int] = {}
        """The sequence of the last transition of each finished run."""
        self._active_runs: dict[str, EntityState[RunData]] = {}
        self._forgotten_sequence = -1
        """The highest sequence of a forgotten run: what comes up to it about an unknown run is a redelivery."""

    # --- fold ---------------------------------------------------------------------------------

    def apply(self, message: Message, *, at: datetime, sequence: int = 0) -> bool:
        """Apply one message; return whether it changed more than when its sender was last seen.

        It changes nothing if it is of no interest here, if it was applied before, or if a newer one was.

        Args:
            message: A transition or any other message.
            at: When it was published, or received if no stream stores it.
            sequence: Its stream sequence; 0 if no stream stores it.

        """
        is_report = self.presence.apply(message, at)
        match message:
            case Transition():
                return self._apply_transition(message, at, sequence)
            case ClientJoined() | ClientDeclined() | FailTrain():
                return self._apply_participation(ReceivedMessage(message, at, sequence))
            case RoundMessage():
                return self._apply_round_message(message, sequence)
            case RoundReply():
                return self._apply_round_reply(message)
            case _:
                return is_report

    def _apply_transition(self, transition: Transition, at: datetime, sequence: int) -> bool:
        def entity(data: DataT) -> EntityState[DataT]:
            return EntityState(transition, data, at, sequence)

        match transition.facts:
            case ServerData() as data:
                is_applied = self.servers.offer(data.task, entity(data))
            case CodeData() as data:
                is_applied = self.codes.offer(data.task, entity(data))
            case ScheduleData() as data:
                is_applied = self.schedules.offer(data.task, entity(data))
            case RunData() as data:
                is_applied = self._apply_run(entity(data))
            case ClientData() | FlClientData() | InferenceData() as data:
                is_applied = self._apply_client(entity(data))
            case _ as unreachable:
                assert_never(unreachable)
        if is_applied:
            self.history.append(entity(transition.facts))
        return is_applied

    def _apply_run(self, run: EntityState[RunData]) -> bool:
        if run.data.run not in self.runs and run.sequence <= self._forgotten_sequence:
            return False
        if not self.runs.offer(run.data.run, run):
            return False
        if run.state in FINAL_RUN_STATES:
            self._finished_runs[run.data.run] = run.sequence
            self._active_runs.pop(run.data.run, None)
        else:  # a newer version of fedbus may start a finished run again
            self._active_runs[run.data.run] = run
            self._finished_runs.pop(run.data.run, None)
        if len(self._finished_runs) > self._max_finished_runs:
            oldest = min(self._finished_runs, key=self._finished_runs.__getitem__)
            self._forgotten_sequence = max(self._forgotten_sequence, self._finished_runs.pop(oldest))
            del self.runs[oldest]
        return True

    def _apply_client(self, entity: EntityState[Any]) -> bool:
        view = self._client(entity.data.client, entity.data.task)
        match entity.data:
            case ClientData() if is_newer(entity, view.manager):
                view.manager = entity
            case FlClientData() if is_newer(entity, view.training):
                view.training = entity
            case InferenceData() if is_newer(entity, view.inference):
                view.inference = entity
            case _:
                return False
        return True

    def _apply_participation(self, received: ReceivedMessage[Participation]) -> bool:
        view = self._client(received.message.client, received.message.task)
        if not is_newer(received, view.participation):
            return False
        view.participation = received
        return True

    def _apply_round_message(self, message: RoundMessage, sequence: int) -> bool:
        progress = self.rounds.get(message.task)
        if progress is not None and sequence < progress.sequence:
            return False
        if progress is None or not progress.is_about(message):
            progress = self.rounds[message.task] = RoundProgress(*_phase(message), sequence)
        if message.message_id in progress.requested:
            return False
        progress.requested[message.message_id] = message.client
        return True

    def _apply_round_reply(self, reply: RoundReply) -> bool:
        progress = self.rounds.get(reply.task)
        if (
            progress is None
            or reply.reply_to not in progress.requested
            or reply.reply_to in progress.answered
        ):
            return False
        progress.answered.add(reply.reply_to)
        return True

    def _client(self, client: str, task: str) -> ClientView:
        return self.clients.setdefault((client, task), ClientView(client, task))

    # --- queries ------------------------------------------------------------------------------

    @property
    def active_runs(self) -> list[EntityState[RunData]]:
        """The runs that have not finished, in the order of their requests."""
        return sorted(self._active_runs.values(), key=_request_order)

    @property
    def finished_runs(self) -> list[EntityState[RunData]]:
        """The runs that finished, failed or were cancelled, in the order of their requests."""
        return sorted((self.runs[run] for run in self._finished_runs), key=_request_order)

    @property
    def latest_run(self) -> EntityState[RunData] | None:
        """The run that was requested last."""
        return max(self.runs.values(), key=_request_order, default=None)

    def active_run(self, task: str) -> EntityState[RunData] | None:
        """Return the run of *task* that has not finished; of several the one that was requested last."""
        active = (run for run in self._active_runs.values() if run.data.task == task)
        return max(active, key=_request_order, default=None)

    def champion(self, task: str) -> ModelRef | None:
        return self.servers[task].data.model if task in self.servers else None

    @property
    def training_count(self) -> int:
        """The number of clients that train, in all tasks."""
        return sum(one.is_training for one in self.clients.values())

    def do_all_serve_champion(self, task: str, clients: int) -> bool:
        """Return whether at least *clients* clients take part in *task* and all of them have its champion.

        A client serves it, if code of the task can. Each must be settled: a client that still trains or changes its
        model does not count.
        """
        champion = self.champion(task)
        of_task = [one for one in self.clients.values() if one.task == task and one.lifecycles]
        return (
            champion is not None
            and len(of_task) >= clients
            and all(
                one.is_settled and one.taken_model is not None and one.taken_model.version == champion.version
                for one in of_task
            )
        )

    def first_model_failure(self, task: str, since: datetime | None = None) -> str:
        """Return why the first model of *task* could not be built, since *since*; empty if it was."""
        server = self.servers.get(task)
        if server is None or server.transition.event != ServerEvent.MODEL_NOT_BUILT:
            return ""
        return "" if since is not None and server.at < since else server.reason

    def not_training_reason(self, client: ClientView) -> str:
        """Explain in a few words why *client* does not train; empty if it does."""
        run, refusal = self.active_run(client.task), client.refusal
        if client.is_training:
            return ""
        if client.state == ClientState.TERMINATED:
            return f"gave up: {client.manager.reason if client.manager else ''}"
        if client.state == ClientState.S0:
            return "begins: waits for the server and the models"
        if refusal is not None and (run is None or run.data.run == refusal.run):
            verb = "declined" if isinstance(refusal, ClientDeclined) else "failed in"
            return f"{verb} {refusal.run}: {refusal.reason}"
        if client.state == ClientState.SYNCING:
            return "gets other code ready"
        if client.state == ClientState.PENDING_APPLICATION:
            return "takes a new model"
        if run is None:
            return "no run is in progress"
        is_recruiting = run.state in (RunState.REQUESTED, RunState.RECRUITING)
        return f"has not joined {run.data.run} yet" if is_recruiting else f"is not in {run.data.run}"


def _request_order(run: EntityState[RunData]) -> tuple[datetime, str]:
    return run.data.requested_at, run.data.run
