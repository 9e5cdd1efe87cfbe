"""The server of a task: what it is asked, what it tells everyone, and its lifecycle.

The server manager owns the lifecycle. The Flower server wrapper does the work of a run and
reports to it; the clients hear only what the server manager casts.
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
    ClientMessage,
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
    """Why the model repository cannot be used: four things that call for four different acts."""

    UNAVAILABLE = "unavailable"
    """It does not answer, or is not there: see that it runs, or mount it."""
    DENIED = "denied"
    """It answers, and does not let us in: give us the right."""
    DAMAGED = "damaged"
    """It answers nonsense, or lacks what it should hold: restore it."""
    EMPTY = "empty"
    """It holds nothing, and the log knows of a model: it is another repository than the one before."""


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
    """All there is to know of a task's server: with its state, what a restarted manager goes on from."""

    kind: Literal["server"] = "server"
    code_version: str = ""
    """Of the run under way, or of the last one."""
    model: ModelRef | None = None
    """The champion: what is served."""
    seal: ModelSignature | None = None
    """The federation's signature of the champion, where it signs its models."""
    term: int = 0
    """Which champion it is, counted from 1: a higher one is the newer word."""
    base: ModelRef | None = None
    """What the run began with."""
    candidate: ModelRef | None = None
    """What the last run came to, promoted or not."""
    run: Id | None = None
    plan: RunPlan | None = None
    recruit_until: AwareDatetime | None = None
    cohort: tuple[str, ...] = ()
    round: int = 0
    trainings: int = 0
    """How many clients' trainings the run's rounds have had, failed ones included."""
    failures: int = 0
    last: RoundResult | None = None
    """The round that this transition is about, on ``round_finished``."""
    checkpoint: Artifact | None = None
    """The global model after *round*: where a lost Flower server is taken up again."""
    recoveries: int = 0
    traceparent: str = ""
    """Where the run's trace goes on, so that a restarted manager stays in it."""
    missing: int = 0
    """How many clients the quorum lacked, on ``recruiting_expired``."""
    trouble: StoreProblem | None = None
    """What is wrong with the model repository, from ``store_unavailable`` to ``store_recovered``."""

    @property
    def thing(self) -> str:
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
        _S.MODEL_INIT: Wait("the model repository", "back off, without end"),
        _S.RECRUITING: Wait("the quorum of clients", "plan.recruit_s"),
        _S.TRAINING: Wait("the last round", "plan.round_s, for each message"),
        _S.PUBLISHING: Wait("the model repository", "publish_s"),
    },
    failures=frozenset(
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


# --- what the server tells all clients -------------------------------------------


class UpdateReady(Message):
    """A Flower server is up and takes in clients for *run*."""

    word: ClassVar[str] = "update_ready"
    family: ClassVar[Family] = Family.CAST

    run: Id
    plan: RunPlan
    recruit_until: AwareDatetime
    code_version: str = ""
    model: ModelRef | None = None
    traceparent: str = ""
    """The run's trace, for whoever joins later than this was said."""


class ModelPublished(Message):
    """A new model version is to be served; *blob* says where to get it."""

    word: ClassVar[str] = "model_published"
    family: ClassVar[Family] = Family.CAST

    model: ModelRef
    blob: BlobRef
    run: Id | None = None
    term: int = 0
    """Which champion it is: of two words about the served version, the one with the higher term holds."""
    seal: ModelSignature | None = None
    reason: str = ""
    """Why it is served now, where that is not the end of a run: a rollback, say."""


class ServerClosed(Message):
    """The run is over, whatever came of it: its trainers may give their memory back."""

    word: ClassVar[str] = "server_closed"
    family: ClassVar[Family] = Family.CAST

    run: Id
    outcome: Literal["finished", "failed", "cancelled"]
    rounds: int = 0
    reason: str = ""
    new_model: bool = True
    """Whether a new model is to be served after it: what a run came to may be kept back."""


# --- what the server manager answers -----------------------------------------------


class HealthStatus(Body):
    """The answer to health_check: *open_run* is the run that takes in clients now."""

    state: ServerState
    open_run: UpdateReady | None = None


class HealthCheck(Request):
    """Is the Flower server up, and does it take in clients?"""

    word: ClassVar[str] = "health_check"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = HealthStatus


class ServerInfo(Body):
    """The answer to get_server_info: what a client needs to bootstrap."""

    code_version: str
    model: ModelRef | None = None
    blob: BlobRef | None = None
    term: int = 0
    seal: ModelSignature | None = None
    code: CodePlan | None = None


class GetServerInfo(Request):
    """Which code and which model does the task have?"""

    word: ClassVar[str] = "get_server_info"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = ServerInfo


class Enrolled(Body):
    """The answer to enroll: the client's durable consumers exist."""

    consumers: tuple[str, ...]


class Enroll(ClientRequest):
    """Make the durable consumers of a client's agents: a client may not make its own."""

    word: ClassVar[str] = "enroll"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = Enrolled

    labels: dict[str, str] = Field(default_factory=dict)


class RunOpened(Body):
    """The answer to open_run."""

    recruit_until: AwareDatetime


class OpenRun(Request):
    """Take in clients for *run* and train it: the scheduler to the server manager."""

    word: ClassVar[str] = "open_run"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = RunOpened

    run: Id
    plan: RunPlan
    overrides: RunOverrides | None = None
    """What was asked for in the place of what the task says: the plan is then the task's own, at the code that the
    run is made of, with these over it. None: *plan*, as it is."""


class RunCancelled(Body):
    """The answer to cancel_run."""


class CancelRun(Request):
    """End *run* without a new model version."""

    word: ClassVar[str] = "cancel_run"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = RunCancelled

    run: Id
    reason: str


# --- between the server manager and the Flower server wrapper -----------------------


class ModelInitialised(Body):
    """The answer to init_model: the artifact is in the model repository, not yet a version."""

    artifact: Artifact


class InitModel(Request):
    """Build the task's initial model and store it."""

    word: ClassVar[str] = "init_model"
    server: ClassVar[AgentName] = AgentName.FLOWER_SERVER
    answer: ClassVar[type[Body]] = ModelInitialised

    code_version: str = ""


class ServerStarting(Body):
    """The answer to start_server."""


class StartServer(Request):
    """Start the Flower server of *run*, at *first_round*, from the model in *artifact*."""

    word: ClassVar[str] = "start_server"
    server: ClassVar[AgentName] = AgentName.FLOWER_SERVER
    answer: ClassVar[type[Body]] = ServerStarting

    run: Id
    plan: RunPlan
    artifact: Artifact
    first_round: int = Field(default=1, ge=1)
    code_version: str = ""
    """What the ServerApp is to be run from; left out: whatever the wrapper has."""


class ServerStopped(Body):
    """The answer to stop_server: its process is gone."""


class StopServer(Request):
    """End the Flower server of *run*, if it is still there."""

    word: ClassVar[str] = "stop_server"
    server: ClassVar[AgentName] = AgentName.FLOWER_SERVER
    answer: ClassVar[type[Body]] = ServerStopped

    run: Id


class ServerFound(Body):
    """The answer to find_server."""

    up: bool


class FindServer(Request):
    """Is the Flower server of *run* there? Who was away may have missed the word of its end."""

    word: ClassVar[str] = "find_server"
    server: ClassVar[AgentName] = AgentName.FLOWER_SERVER
    answer: ClassVar[type[Body]] = ServerFound

    run: Id
    say_so: bool = False
    """Whether, if it is gone, that is to be told as server_lost: behind all that it had said itself."""


class ServerStarted(Message):
    """The Flower server of *run* is up and listens for clients."""

    word: ClassVar[str] = "server_started"
    family: ClassVar[Family] = Family.SRV

    run: Id


class BeginTraining(Message):
    """The quorum is there: run the ServerApp with *cohort*, and with whoever joins later."""

    word: ClassVar[str] = "begin_training"
    family: ClassVar[Family] = Family.SRV

    run: Id
    cohort: tuple[str, ...]


class RoundFinished(Message):
    """A round came to an end; *checkpoint* is the global model after it."""

    word: ClassVar[str] = "round_finished"
    family: ClassVar[Family] = Family.SRV

    run: Id
    round: int = Field(ge=0)
    result: RoundResult
    checkpoint: Artifact | None = None


class RunFinished(Message):
    """All rounds are done and *artifact* is stored: it may become a version."""

    word: ClassVar[str] = "run_finished"
    family: ClassVar[Family] = Family.SRV

    run: Id
    artifact: Artifact
    rounds: int


class RunFailed(Message):
    """The ServerApp gave up: the model version does not change."""

    word: ClassVar[str] = "run_failed"
    family: ClassVar[Family] = Family.SRV

    run: Id
    reason: str


class ServerLost(Message):
    """The Flower server's process may be gone without a word. Whoever acts on it asks find_server first."""

    word: ClassVar[str] = "server_lost"
    family: ClassVar[Family] = Family.SRV

    run: Id
    reason: str


# --- the rounds themselves: Flower's messages --------------------------------------------


class MessageContent(Body):
    """A Flower RecordDict: inside the event if it is small and without arrays, else as a blob."""

    inline: bytes | None = None
    blob: BlobRef | None = None


class RoundMessage(ClientMessage):
    """A Flower message to one node: train, evaluate or query."""

    word: ClassVar[str] = "round_message"
    family: ClassVar[Family] = Family.CMD

    run: Id
    message_id: str
    message_type: str
    round: int | None = None
    """What Flower calls the group, where it is a number."""
    group_id: str = ""
    created_at: float
    """Seconds since the epoch, as Flower counts."""
    ttl_s: float
    content: MessageContent
