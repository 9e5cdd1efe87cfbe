"""The server of a task: its lifecycle, the requests it answers and the messages it publishes.

The server manager owns the lifecycle, and alone publishes messages to all clients.
"""

from enum import StrEnum
from typing import ClassVar, Literal, TypedDict

from pydantic import AwareDatetime, Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.code import CodePlan
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import (
    Body,
    ClientRequest,
    Family,
    LifecycleData,
    Message,
    Request,
)
from fedbus.contracts.model import Artifact, BlobRef, ModelRef, ModelSignature
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan

# --- the lifecycle -------------------------------------------------------------


class ServerState(StrEnum):
    MODEL_INIT = "model_init"
    WAITING = "waiting"
    RECRUITING = "recruiting"
    TRAINING = "training"
    PUBLISHING = "publishing"


class StoreProblem(StrEnum):
    """Why the model repository cannot be used. Each value calls for a different action of the operator."""

    UNAVAILABLE = "unavailable"
    """It does not answer or does not exist. Start it, or mount it."""
    DENIED = "denied"
    """It answers and refuses access. Change the credentials or the permissions."""
    DAMAGED = "damaged"
    """Its content is not valid or incomplete. Restore it."""
    EMPTY = "empty"
    """It holds no version, although the event log names one. It is a different repository than before."""


class ServerEvent(StrEnum):
    STARTED = "started"
    MODEL_READY = "model_ready"
    MODEL_NOT_BUILT = "model_not_built"
    STORE_UNAVAILABLE = "store_unavailable"
    STORE_RECOVERED = "store_recovered"
    RUN_REQUESTED = "run_requested"
    QUORUM_REACHED = "quorum_reached"
    RECRUITING_EXPIRED = "recruiting_expired"
    ROUND_FINISHED = "round_finished"
    SERVER_LOST = "server_lost"
    SERVER_RECOVERED = "server_recovered"
    RUN_FINISHED = "run_finished"
    RUN_FAILED = "run_failed"
    RUN_CANCELLED = "run_cancelled"
    VERSION_PUBLISHED = "version_published"
    CANDIDATE_KEPT = "candidate_kept"
    VERSION_REFUSED = "version_refused"
    MODEL_PROMOTED = "model_promoted"
    MODEL_ROLLED_BACK = "model_rolled_back"
    LINEAGE_STARTED = "lineage_started"


class ServerData(LifecycleData):
    """The data of a task's server. Together with the state, a restarted server manager continues from it."""

    kind: Literal["server"] = "server"
    code_version: str = ""
    """The code version of the current run, or of the last one."""
    model: ModelRef | None = None
    """The champion."""
    seal: ModelSignature | None = None
    """The federation's signature of the champion; None if the federation does not sign models."""
    term: int = 0
    """The term of the champion, counted from 1. A higher term is newer."""
    base: ModelRef | None = None
    """The model that the run started from."""
    candidate: ModelRef | None = None
    """The result of the last run, promoted or not."""
    run: Id | None = None
    plan: RunPlan | None = None
    recruit_until: AwareDatetime | None = None
    cohort: tuple[str, ...] = ()
    round: int = 0
    trainings: int = 0
    """The number of trainings in the run, summed over clients and rounds, including failed ones."""
    failures: int = 0
    last: RoundResult | None = None
    """The result of the finished round, on ``round_finished``."""
    checkpoint: Artifact | None = None
    """The global model after *round*. A lost Flower server restarts from it."""
    recoveries: int = 0
    traceparent: str = ""
    """The run's trace context, so that a restarted server manager continues the trace."""
    missing: int = 0
    """The number of clients that the quorum lacked, on ``recruiting_expired``."""
    trouble: StoreProblem | None = None
    """The problem of the model repository, from ``store_unavailable`` to ``store_recovered``: ``unavailable``,
    ``denied``, ``damaged`` or ``empty``."""

    @property
    def key(self) -> str:
        return self.task


class ServerChanges(TypedDict, total=False):
    """The data of the server of a task that a transition may change."""

    model: ModelRef | None
    seal: ModelSignature | None
    term: int
    code_version: str
    base: ModelRef | None
    candidate: ModelRef | None
    run: Id | None
    plan: RunPlan | None
    recruit_until: AwareDatetime | None
    cohort: tuple[str, ...]
    round: int
    trainings: int
    failures: int
    last: RoundResult | None
    checkpoint: Artifact | None
    recoveries: int
    traceparent: str
    missing: int
    trouble: StoreProblem | None


_S = ServerState
_E = ServerEvent
SERVER = Lifecycle[ServerState, ServerEvent, ServerData, ServerChanges](
    kind="server",
    owner=AgentName.SERVER_MANAGER,
    initial=_S.MODEL_INIT,
    creation=_E.STARTED,
    data=ServerData,
    arrows={
        (_S.MODEL_INIT, _E.MODEL_READY): _S.WAITING,
        (_S.MODEL_INIT, _E.STORE_UNAVAILABLE): _S.MODEL_INIT,
        (_S.MODEL_INIT, _E.MODEL_NOT_BUILT): _S.MODEL_INIT,
        (_S.WAITING, _E.STORE_UNAVAILABLE): _S.WAITING,
        (_S.WAITING, _E.STORE_RECOVERED): _S.WAITING,
        (_S.RECRUITING, _E.STORE_UNAVAILABLE): _S.RECRUITING,
        (_S.RECRUITING, _E.STORE_RECOVERED): _S.RECRUITING,
        (_S.TRAINING, _E.STORE_UNAVAILABLE): _S.TRAINING,
        (_S.TRAINING, _E.STORE_RECOVERED): _S.TRAINING,
        (_S.WAITING, _E.RUN_REQUESTED): _S.RECRUITING,
        (_S.RECRUITING, _E.QUORUM_REACHED): _S.TRAINING,
        (_S.RECRUITING, _E.RECRUITING_EXPIRED): _S.WAITING,
        (_S.RECRUITING, _E.RUN_FAILED): _S.WAITING,
        (_S.RECRUITING, _E.RUN_CANCELLED): _S.WAITING,
        (_S.TRAINING, _E.ROUND_FINISHED): _S.TRAINING,
        (_S.TRAINING, _E.SERVER_LOST): _S.TRAINING,
        (_S.TRAINING, _E.SERVER_RECOVERED): _S.TRAINING,
        (_S.TRAINING, _E.RUN_FINISHED): _S.PUBLISHING,
        (_S.TRAINING, _E.RUN_FAILED): _S.WAITING,
        (_S.TRAINING, _E.RUN_CANCELLED): _S.WAITING,
        (_S.PUBLISHING, _E.VERSION_PUBLISHED): _S.WAITING,
        (_S.PUBLISHING, _E.CANDIDATE_KEPT): _S.WAITING,
        (_S.PUBLISHING, _E.VERSION_REFUSED): _S.WAITING,
        (_S.WAITING, _E.MODEL_PROMOTED): _S.WAITING,
        (_S.RECRUITING, _E.MODEL_PROMOTED): _S.RECRUITING,
        (_S.TRAINING, _E.MODEL_PROMOTED): _S.TRAINING,
        (_S.WAITING, _E.MODEL_ROLLED_BACK): _S.WAITING,
        (_S.RECRUITING, _E.MODEL_ROLLED_BACK): _S.RECRUITING,
        (_S.TRAINING, _E.MODEL_ROLLED_BACK): _S.TRAINING,
        (_S.WAITING, _E.LINEAGE_STARTED): _S.WAITING,
    },
    changes={
        _E.MODEL_READY: {"model", "seal", "term", "code_version", "trouble"},
        _E.MODEL_NOT_BUILT: {"trouble"},
        _E.STORE_UNAVAILABLE: {"trouble"},
        _E.STORE_RECOVERED: {"trouble"},
        _E.RUN_REQUESTED: {
            "run",
            "plan",
            "code_version",
            "base",
            "candidate",
            "recruit_until",
            "cohort",
            "round",
            "trainings",
            "failures",
            "last",
            "checkpoint",
            "recoveries",
            "missing",
            "traceparent",
        },
        _E.QUORUM_REACHED: {"cohort"},
        _E.RECRUITING_EXPIRED: {"missing"},
        _E.ROUND_FINISHED: {"round", "trainings", "failures", "last", "checkpoint", "cohort"},
        _E.SERVER_LOST: {"recoveries"},
        _E.SERVER_RECOVERED: {"cohort"},
        _E.RUN_FINISHED: {"checkpoint", "round"},
        _E.VERSION_PUBLISHED: {"model", "seal", "term", "candidate"},
        _E.CANDIDATE_KEPT: {"candidate"},
        _E.MODEL_PROMOTED: {"model", "seal", "term"},
        _E.MODEL_ROLLED_BACK: {"model", "seal", "term"},
        _E.LINEAGE_STARTED: {"model", "seal", "term", "code_version"},
    },
    waits={
        _S.MODEL_INIT: Wait("the model repository", "no limit; retries with backoff"),
        _S.RECRUITING: Wait("the quorum of clients", "plan.recruit_s"),
        _S.TRAINING: Wait("the last round", "plan.round_s for each message"),
        _S.PUBLISHING: Wait("the model repository", "120 s (PUBLISH_S)"),
    },
    failure_events=frozenset(
        {
            _E.STORE_UNAVAILABLE,
            _E.MODEL_NOT_BUILT,
            _E.RECRUITING_EXPIRED,
            _E.RUN_FAILED,
            _E.SERVER_LOST,
            _E.VERSION_REFUSED,
        }
    ),
    between_runs=frozenset({_S.MODEL_INIT, _S.WAITING}),
)


# --- messages to all clients ------------------------------------------------------


class UpdateReady(Message):
    """*run* is recruiting: its Flower server is running, and clients may join until *recruit_until*."""

    name: ClassVar[str] = "update_ready"
    family: ClassVar[Family] = Family.CAST

    run: Id
    plan: RunPlan
    recruit_until: AwareDatetime
    code_version: str = ""
    model: ModelRef | None = None
    traceparent: str = ""
    """The run's trace context, for clients that learn of the run from a later reply."""


class ModelPublished(Message):
    """Announcement of a new champion. All clients fetch *blob* and serve it."""

    name: ClassVar[str] = "model_published"
    family: ClassVar[Family] = Family.CAST

    model: ModelRef
    blob: BlobRef
    run: Id | None = None
    term: int = 0
    """The term of the champion. Of two messages, the one with the higher term is valid."""
    seal: ModelSignature | None = None
    reason: str = ""
    """Why this version became champion, if not at the end of a run: for example a rollback."""


class ServerClosed(Message):
    """The run has ended, with any *outcome*. Its trainer processes may end."""

    name: ClassVar[str] = "server_closed"
    family: ClassVar[Family] = Family.CAST

    run: Id
    outcome: Literal["finished", "failed", "cancelled"]
    rounds: int = 0
    reason: str = ""
    new_model: bool = True
    """True if the run's model became champion. The gate may have rejected it."""


# --- requests to the server manager -------------------------------------------------


class HealthStatus(Body):
    """Reply to `health_check`. *open_run* is the run that is recruiting now, if there is one."""

    state: ServerState
    open_run: UpdateReady | None = None


class HealthCheck(Request[HealthStatus]):
    """Request for the state of the task's server and the run that clients may join."""

    name: ClassVar[str] = "health_check"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER


class ServerInfo(Body):
    """Reply to `get_server_info`: what a client needs to start."""

    code_version: str
    model: ModelRef | None = None
    blob: BlobRef | None = None
    term: int = 0
    seal: ModelSignature | None = None
    code: CodePlan | None = None


class GetServerInfo(Request[ServerInfo]):
    """Request for the task's code version and champion."""

    name: ClassVar[str] = "get_server_info"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER


class Enrolled(Body):
    """Reply to `enroll`: the client's durable consumers exist."""

    consumers: tuple[str, ...]


class Enroll(ClientRequest[Enrolled]):
    """Request to create the durable consumers of a client's agents. A client has no permission to create them."""

    name: ClassVar[str] = "enroll"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    labels: dict[str, str] = Field(default_factory=dict)


class RunOpened(Body):
    """Reply to `open_run`: clients may join until *recruit_until*."""

    recruit_until: AwareDatetime


class OpenRun(Request[RunOpened]):
    """Request to recruit clients for *run* and to train it. The workflow scheduler sends it."""

    name: ClassVar[str] = "open_run"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    run: Id
    plan: RunPlan
    overrides: RunOverrides | None = None
    """Values that replace those of the task's plan at the code version of the run. None: use *plan* unchanged."""


class RunCancelled(Body):
    """Reply to `cancel_run`: the run is cancelled."""


class CancelRun(Request[RunCancelled]):
    """Request to end *run* without a new model version."""

    name: ClassVar[str] = "cancel_run"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    run: Id
    reason: str
