"""Situations: typed views of the data of a lifecycle, one class for each state.

The data on the wire has every field in every state, and most of them may be empty. A *situation* is a
frozen dataclass with the fields of one state, in which required fields are never None. A
function for each lifecycle creates it from the state and the data:

    match server_situation(handle.state, handle.data):
        case ServerTraining(run=run, checkpoint=checkpoint): ...

It raises `IncompleteData` if the last transition lacks a required field.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeAlias, TypeVar, assert_never

from fedbus.contracts.client import ClientData, ClientState, FlClientData, FlClientState
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.model import Artifact, ModelRef
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.scheduling import ScheduleData, ScheduleState
from fedbus.contracts.server import ServerData, ServerState

Data = TypeVar("Data", bound=LifecycleData)
T = TypeVar("T")


class IncompleteData(Exception):
    """The last transition of an entity lacks data that its state requires. It is a bug of the owner."""

    def __init__(self, kind: str, key: str, state: str, missing: str) -> None:
        super().__init__(
            f"{kind} {key} is in state {state}, but its last transition lacks {missing}. "
            f"Find the transition with `fedbus events tail --since 1d`, and report it as a bug"
        )
        self.kind = kind
        self.key = key
        self.state = state
        self.missing = missing


@dataclass(frozen=True)
class _Parser(Generic[Data]):
    state: str
    data: Data

    def need(self, value: T | None, name: str) -> T:
        """Return *value*, the content of field *name*; raises IncompleteData if it is empty."""
        if value is None or value == "":
            raise IncompleteData(self.data.kind, self.data.key, self.state, name)
        return value


# --- the server of a task ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerInitializing:
    """There is no model yet."""


@dataclass(frozen=True)
class ServerWaiting:
    """No run is active."""

    model: ModelRef
    """The champion."""
    candidate: ModelRef | None
    """The result of the last run, promoted or not."""


@dataclass(frozen=True)
class ServerRun:
    """The fields that every active run has."""

    run: str
    plan: RunPlan
    recruit_until: datetime
    code_version: str
    model: ModelRef
    """The champion, which may have changed since the run started."""
    base: ModelRef
    """The model that the run started from."""
    cohort: tuple[str, ...]
    traceparent: str


@dataclass(frozen=True)
class ServerRecruiting(ServerRun):
    """A run waits for its quorum."""


@dataclass(frozen=True)
class ServerTraining(ServerRun):
    """A run trains its rounds."""

    round: int
    """The last finished round."""
    trainings: int
    failures: int
    last: RoundResult | None
    """The result of *round*; None before the first one."""
    checkpoint: Artifact | None
    """The last stored global model; None before the first one."""
    recoveries: int

    @property
    def latest(self) -> Artifact:
        """The model from which a lost Flower server restarts."""
        return self.checkpoint or self.base


@dataclass(frozen=True)
class ServerPublishing(ServerRun):
    """All rounds have finished, and the result becomes a version."""

    round: int
    trainings: int
    failures: int
    last: RoundResult | None
    """None if the app reported no rounds."""
    result: Artifact


ServerSituation: TypeAlias = (
    ServerInitializing | ServerWaiting | ServerRecruiting | ServerTraining | ServerPublishing
)


def server_situation(state: ServerState, data: ServerData) -> ServerSituation:
    """Return the situation of a task's server; raises IncompleteData."""
    match state:
        case ServerState.MODEL_INIT:
            return ServerInitializing()
        case ServerState.WAITING:
            model = _Parser(state, data).need(data.model, "model")
            return ServerWaiting(model=model, candidate=data.candidate)
        case ServerState.RECRUITING:
            return server_recruiting(data)
        case ServerState.TRAINING:
            return server_training(data)
        case ServerState.PUBLISHING:
            return server_publishing(data)
        case _:
            assert_never(state)


def server_recruiting(data: ServerData) -> ServerRecruiting:
    run = _server_run(ServerState.RECRUITING, data)
    return ServerRecruiting(**vars(run))


def server_training(data: ServerData) -> ServerTraining:
    run = _server_run(ServerState.TRAINING, data)
    return ServerTraining(
        **vars(run),
        round=data.round,
        trainings=data.trainings,
        failures=data.failures,
        last=data.last,
        checkpoint=data.checkpoint,
        recoveries=data.recoveries,
    )


def server_publishing(data: ServerData) -> ServerPublishing:
    run = _server_run(ServerState.PUBLISHING, data)
    return ServerPublishing(
        **vars(run),
        round=data.round,
        trainings=data.trainings,
        failures=data.failures,
        last=data.last,
        result=_Parser(ServerState.PUBLISHING, data).need(data.checkpoint, "checkpoint"),
    )


def _server_run(state: ServerState, data: ServerData) -> ServerRun:
    parser = _Parser(state, data)
    model = parser.need(data.model, "model")
    return ServerRun(
        run=parser.need(data.run, "run"),
        plan=parser.need(data.plan, "plan"),
        recruit_until=parser.need(data.recruit_until, "recruit_until"),
        code_version=data.code_version,
        model=model,
        base=data.base or model,
        cohort=data.cohort,
        traceparent=data.traceparent,
    )


# --- the schedule of a task -------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduleWatching:
    """The trigger is false."""

    next_at: datetime | None
    """When a run can start because of time alone; None if the trigger also needs an event."""
    awaits: tuple[str, ...]
    """The conditions of the trigger that are not true yet."""


@dataclass(frozen=True)
class ScheduleDue:
    """The trigger is true, and the run has not started yet."""

    due_since: datetime
    cause: str
    traceparent: str
    """The trace context in which the run continues; empty if there is none."""


ScheduleSituation: TypeAlias = ScheduleWatching | ScheduleDue


def schedule_situation(state: ScheduleState, data: ScheduleData) -> ScheduleSituation:
    """Return the situation of a task's schedule; raises IncompleteData."""
    match state:
        case ScheduleState.WATCHING:
            return ScheduleWatching(next_at=data.next_at, awaits=data.awaits)
        case ScheduleState.DUE:
            return schedule_due(data)
        case _:
            assert_never(state)


def schedule_due(data: ScheduleData) -> ScheduleDue:
    return ScheduleDue(
        due_since=_Parser(ScheduleState.DUE, data).need(data.due_since, "due_since"),
        cause=data.cause,
        traceparent=data.traceparent,
    )


# --- a client ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClientBootstrapping:
    """The client has no model yet, or is restarting."""


@dataclass(frozen=True)
class ClientApplying:
    """The inference agent of the client is loading a model."""

    model: ModelRef


@dataclass(frozen=True)
class ClientServing:
    """The client serves and may join a run."""

    model: ModelRef


@dataclass(frozen=True)
class ClientSyncing:
    """The client serves and switches to another code version."""

    model: ModelRef


@dataclass(frozen=True)
class ClientLearning:
    """The client serves and takes part in a run."""

    model: ModelRef
    run: str


@dataclass(frozen=True)
class ClientTerminated:
    """The client could not start."""


ClientSituation: TypeAlias = (
    ClientBootstrapping | ClientApplying | ClientServing | ClientSyncing | ClientLearning | ClientTerminated
)


def client_situation(state: ClientState, data: ClientData) -> ClientSituation:
    """Return the situation of a client; raises IncompleteData."""
    parser = _Parser(state, data)
    match state:
        case ClientState.S0:
            return ClientBootstrapping()
        case ClientState.TERMINATED:
            return ClientTerminated()
        case ClientState.PENDING_APPLICATION:
            return ClientApplying(parser.need(data.model, "model"))
        case ClientState.SERVING:
            return ClientServing(parser.need(data.model, "model"))
        case ClientState.SYNCING:
            return ClientSyncing(parser.need(data.model, "model"))
        case ClientState.LEARNING:
            return ClientLearning(parser.need(data.model, "model"), parser.need(data.run, "run"))
        case _:
            assert_never(state)


# --- a client's training ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FlClientWaiting:
    """The client is in no run."""


@dataclass(frozen=True)
class FlClientPending:
    """The trainer process waits for the first message of the run."""

    run: str


@dataclass(frozen=True)
class FlClientTraining:
    run: str


@dataclass(frozen=True)
class FlClientFinished:
    """The run has ended, and the FL client has not reported it yet."""

    run: str


FlClientSituation: TypeAlias = FlClientWaiting | FlClientPending | FlClientTraining | FlClientFinished


def fl_client_situation(state: FlClientState, data: FlClientData) -> FlClientSituation:
    """Return the situation of a client's training; raises IncompleteData."""
    parser = _Parser(state, data)
    match state:
        case FlClientState.WAITING:
            return FlClientWaiting()
        case FlClientState.PENDING:
            return FlClientPending(parser.need(data.run, "run"))
        case FlClientState.TRAINING:
            return FlClientTraining(parser.need(data.run, "run"))
        case FlClientState.FINISHED:
            return FlClientFinished(parser.need(data.run, "run"))
        case _:
            assert_never(state)
