"""The three agents of a client: their lifecycles, and the messages they publish.

The client manager decides, the FL client trains and the inference agent serves predictions. No
transition of the other two lifecycles interrupts serving.
"""

from enum import StrEnum
from typing import ClassVar, Literal, TypedDict

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client_metrics import ClientMetrics
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import ClientMessage, Family, LifecycleData
from fedbus.contracts.model import ModelRef
from fedbus.contracts.round_messages import MessageContent
from fedbus.contracts.run import RunPlan

# --- the client manager -------------------------------------------------------------


class ClientState(StrEnum):
    S0 = "s0"
    PENDING_APPLICATION = "pending_application"
    SERVING = "serving"
    SYNCING = "syncing"
    LEARNING = "learning"
    TERMINATED = "terminated"


class ClientEvent(StrEnum):
    STARTED = "started"
    RESTARTED = "restarted"
    MODEL_FETCHED = "model_fetched"
    BOOTSTRAP_FAILED = "bootstrap_failed"
    INFER_READY = "infer_ready"
    INFER_REFUSED = "infer_refused"
    INFER_RETRIED = "infer_retried"
    MODEL_NOT_SERVED = "model_not_served"
    NO_NEW_MODEL = "no_new_model"
    CLIENT_START = "client_start"
    MODEL_PUBLISHED = "model_published"
    MODEL_RETURNED = "model_returned"
    CODE_PUBLISHED = "code_published"
    CODE_READY = "code_ready"
    CODE_REFUSED = "code_refused"
    FIN_TRAIN = "fin_train"
    FAIL_TRAIN = "fail_train"
    TRAINER_LOST = "trainer_lost"
    DEADLINE = "deadline"


class ClientData(LifecycleData):
    """The data of a client in one task."""

    kind: Literal["client"] = "client"
    client: Id
    model: ModelRef | None = None
    """The version that the client has taken. It serves this version, or is about to, unless *not_served* is set."""
    not_served: str = ""
    """Why the client does not serve *model*, although it has taken it and trains; empty if it serves it."""
    run: Id | None = None
    code_version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the operator gave the device: ``{"site": "lab"}``."""

    @property
    def key(self) -> str:
        return f"{self.client}.{self.task}"


class ClientChanges(TypedDict, total=False):
    """The data of a client that a transition may change."""

    model: ModelRef | None
    not_served: str
    run: Id | None
    code_version: str
    labels: dict[str, str]


_C = ClientState
_CE = ClientEvent
CLIENT = Lifecycle[ClientState, ClientEvent, ClientData, ClientChanges](
    kind="client",
    owner=AgentName.CLIENT_MANAGER,
    initial=_C.S0,
    creation=_CE.STARTED,
    data=ClientData,
    arrows={
        (_C.S0, _CE.MODEL_FETCHED): _C.PENDING_APPLICATION,
        (_C.S0, _CE.BOOTSTRAP_FAILED): _C.TERMINATED,
        (_C.PENDING_APPLICATION, _CE.INFER_READY): _C.SERVING,
        (_C.PENDING_APPLICATION, _CE.INFER_REFUSED): _C.SERVING,
        (_C.PENDING_APPLICATION, _CE.INFER_RETRIED): _C.PENDING_APPLICATION,
        (_C.PENDING_APPLICATION, _CE.MODEL_NOT_SERVED): _C.SERVING,
        (_C.PENDING_APPLICATION, _CE.NO_NEW_MODEL): _C.SERVING,
        (_C.SERVING, _CE.CLIENT_START): _C.LEARNING,
        (_C.SERVING, _CE.MODEL_PUBLISHED): _C.PENDING_APPLICATION,
        (_C.SERVING, _CE.MODEL_RETURNED): _C.SERVING,
        (_C.SERVING, _CE.CODE_PUBLISHED): _C.SYNCING,
        (_C.SYNCING, _CE.CODE_READY): _C.SERVING,
        (_C.SYNCING, _CE.CODE_REFUSED): _C.SERVING,
        (_C.LEARNING, _CE.FIN_TRAIN): _C.PENDING_APPLICATION,
        (_C.LEARNING, _CE.FAIL_TRAIN): _C.SERVING,
        (_C.LEARNING, _CE.TRAINER_LOST): _C.SERVING,
        (_C.LEARNING, _CE.DEADLINE): _C.SERVING,
        (_C.SERVING, _CE.RESTARTED): _C.S0,
        (_C.PENDING_APPLICATION, _CE.RESTARTED): _C.S0,
        (_C.SYNCING, _CE.RESTARTED): _C.S0,
        (_C.LEARNING, _CE.RESTARTED): _C.S0,
        (_C.TERMINATED, _CE.RESTARTED): _C.S0,
    },
    changes={
        _CE.RESTARTED: {"run", "code_version", "labels"},
        _CE.MODEL_FETCHED: {"model", "code_version"},
        _CE.INFER_READY: {"model", "not_served", "code_version"},
        _CE.INFER_REFUSED: {"model", "not_served", "code_version"},
        _CE.INFER_RETRIED: {"model", "not_served", "code_version"},
        _CE.MODEL_NOT_SERVED: {"model", "not_served", "code_version"},
        _CE.NO_NEW_MODEL: {"model", "not_served"},
        _CE.CLIENT_START: {"run"},
        _CE.MODEL_PUBLISHED: {"model"},
        _CE.MODEL_RETURNED: {"model", "not_served"},
        _CE.CODE_READY: {"model", "not_served", "code_version"},
        _CE.CODE_REFUSED: {"model", "not_served"},
        _CE.FIN_TRAIN: {"run", "model"},
        _CE.FAIL_TRAIN: {"run", "model"},
        _CE.TRAINER_LOST: {"run", "model"},
        _CE.DEADLINE: {"run", "model"},
    },
    waits={
        _C.S0: Wait(
            "the server and the model repository", "300 s (BOOTSTRAP_S), and again for the first model"
        ),
        _C.PENDING_APPLICATION: Wait("the inference agent to load the model", "120 s (APPLY_S)"),
        _C.SYNCING: Wait("the task's code", "900 s (SYNC_S)"),
        _C.LEARNING: Wait(
            "the run to end",
            "plan.recruit_s + 2 · plan.rounds · plan.round_s + 60 s (SPARE_S); "
            "1000 rounds (ASSUMED_ROUNDS) if the app decides",
        ),
    },
    failure_events=frozenset(
        {
            _CE.BOOTSTRAP_FAILED,
            _CE.CODE_REFUSED,
            _CE.INFER_REFUSED,
            _CE.MODEL_RETURNED,
            _CE.FAIL_TRAIN,
            _CE.TRAINER_LOST,
            _CE.DEADLINE,
        }
    ),
)


# --- the FL client ------------------------------------------------------------------


class FlClientState(StrEnum):
    WAITING = "waiting"
    PENDING = "pending"
    TRAINING = "training"
    FINISHED = "finished"


class FlClientEvent(StrEnum):
    STARTED = "started"
    CLIENT_START = "client_start"
    ROUND_STARTED = "round_started"
    RUN_FINISHED = "run_finished"
    REPORTED = "reported"
    FAILED = "failed"


class FlClientData(LifecycleData):
    """The data of a client's training in one task."""

    kind: Literal["fl_client"] = "fl_client"
    client: Id
    run: Id | None = None

    @property
    def key(self) -> str:
        return f"{self.client}.{self.task}"


class FlClientChanges(TypedDict, total=False):
    """The data of a client's training that a transition may change."""

    run: Id | None


_F = FlClientState
_FE = FlClientEvent
FL_CLIENT = Lifecycle[FlClientState, FlClientEvent, FlClientData, FlClientChanges](
    kind="fl_client",
    owner=AgentName.FLOWER_CLIENT,
    initial=_F.WAITING,
    creation=_FE.STARTED,
    data=FlClientData,
    arrows={
        (_F.WAITING, _FE.CLIENT_START): _F.PENDING,
        (_F.PENDING, _FE.ROUND_STARTED): _F.TRAINING,
        (_F.TRAINING, _FE.RUN_FINISHED): _F.FINISHED,
        (_F.FINISHED, _FE.REPORTED): _F.WAITING,
        (_F.PENDING, _FE.FAILED): _F.WAITING,
        (_F.TRAINING, _FE.FAILED): _F.WAITING,
    },
    changes={
        _FE.CLIENT_START: {"run"},
        _FE.REPORTED: {"run"},
        _FE.FAILED: {"run"},
    },
    waits={
        _F.PENDING: Wait("the first message of the run", "the limit of the client in `learning`"),
        _F.TRAINING: Wait("the run to end", "the limit of the client in `learning`"),
    },
    failure_events=frozenset({_FE.FAILED}),
)


# --- the inference agent ---------------------------------------------------------------


class InferenceState(StrEnum):
    EMPTY = "empty"
    SERVING = "serving"
    UPDATING = "updating"


class InferenceEvent(StrEnum):
    STARTED = "started"
    RESTARTED = "restarted"
    INFER_START = "infer_start"
    INFER_UPDATE = "infer_update"
    MODEL_LOADED = "model_loaded"
    LOAD_REFUSED = "load_refused"
    MODEL_NOT_SERVED = "model_not_served"
    MODEL_RETURNED = "model_returned"


class InferenceData(LifecycleData):
    """The data of a client's inference agent in one task."""

    kind: Literal["inference"] = "inference"
    client: Id
    model: ModelRef | None = None
    not_served: str = ""
    """Why the newest version of the client is not served: no code fits it. *model* may be an older version, which is
    served. Empty if the newest version is served."""
    endpoint: str = ""
    """The base URL for predictions: ``http://127.0.0.1:8080``."""

    @property
    def key(self) -> str:
        return f"{self.client}.{self.task}"


class InferenceChanges(TypedDict, total=False):
    """The data of a client's inference agent that a transition may change."""

    model: ModelRef | None
    not_served: str
    endpoint: str


_I = InferenceState
_IE = InferenceEvent
INFERENCE = Lifecycle[InferenceState, InferenceEvent, InferenceData, InferenceChanges](
    kind="inference",
    owner=AgentName.INFERENCE,
    initial=_I.EMPTY,
    creation=_IE.STARTED,
    data=InferenceData,
    arrows={
        (_I.EMPTY, _IE.INFER_START): _I.SERVING,
        (_I.SERVING, _IE.INFER_UPDATE): _I.UPDATING,
        (_I.UPDATING, _IE.MODEL_LOADED): _I.SERVING,
        (_I.UPDATING, _IE.LOAD_REFUSED): _I.SERVING,
        (_I.EMPTY, _IE.MODEL_NOT_SERVED): _I.EMPTY,
        (_I.UPDATING, _IE.MODEL_NOT_SERVED): _I.SERVING,
        (_I.SERVING, _IE.MODEL_RETURNED): _I.SERVING,
        (_I.SERVING, _IE.RESTARTED): _I.EMPTY,
        (_I.UPDATING, _IE.RESTARTED): _I.EMPTY,
    },
    changes={
        _IE.RESTARTED: {"model", "endpoint"},
        _IE.INFER_START: {"model", "not_served", "endpoint"},
        _IE.MODEL_LOADED: {"model", "not_served"},
        _IE.MODEL_NOT_SERVED: {"not_served", "endpoint"},
        _IE.MODEL_RETURNED: {"model", "not_served"},
    },
    waits={_I.UPDATING: Wait("the new model to load and to pass the checks", "120 s (APPLY_S)")},
    failure_events=frozenset({_IE.LOAD_REFUSED, _IE.MODEL_RETURNED}),
)


# --- client → server ----------------------------------------------------------------------


class ClientJoined(ClientMessage):
    """The client has joined *run*. Its trainer process is running and consumes the messages of the run."""

    name: ClassVar[str] = "joined"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    code_version: str = ""


class ClientDeclined(ClientMessage):
    """The client does not take part in *run*, for *reason*."""

    name: ClassVar[str] = "declined"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    reason: str
    rule: str = ""
    """The eligibility rule of the task that is false on this device; empty if the reason is another."""
    facts: dict[str, float] = Field(default_factory=dict)
    """The values that the rule was evaluated with, by variable."""


class RoundReply(ClientMessage):
    """The reply to a `round_message`. It has either content, or an error with a code of the library and a reason."""

    name: ClassVar[str] = "round_reply"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    round: int | None = None
    message_id: str
    reply_to: str
    """The *message_id* of the `round_message`."""
    created_at: float
    """Seconds since the epoch."""
    ttl_s: float
    """The time to live of the reply, from *created_at*."""
    content: MessageContent | None = None
    error_code: int | None = None
    error_reason: str = ""
    train_s: float = Field(default=0.0, ge=0)
    """The duration of the training or evaluation."""
    left_out: int = Field(default=0, ge=0)
    """Captured rows that were excluded from this training because they failed the task's data checks."""
    figures: ClientMetrics = Field(default_factory=dict)
    """The metrics that the app reported: ``train_loss``, ``eval_accuracy``, …"""


class FinTrain(ClientMessage):
    """The client has finished *run*, and its trainer process has ended."""

    name: ClassVar[str] = "fin_train"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    rounds: int = 0
    new_model: bool = True
    """True if the run produced a model that the clients will serve."""


class FailTrain(ClientMessage):
    """The client has left *run* because of a failure. The run continues without it."""

    name: ClassVar[str] = "fail_train"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    reason: str
    trainer_lost: bool = False
    """True if the trainer process ended without reporting a reason."""
    load_failed: bool = False
    """True if the task's code could not be loaded on this device, so that the client cannot join the run."""


class Heartbeat(ClientMessage):
    """The client is still training *run*. It is not stored, because a late heartbeat has no meaning."""

    name: ClassVar[str] = "heartbeat"
    family: ClassVar[Family] = Family.CLIENT
    durable: ClassVar[bool] = False

    run: Id


# --- between the agents of one client ---------------------------------------------------------


class ClientStart(ClientMessage):
    """Command to train *run*. The client manager sends it to the FL client."""

    name: ClassVar[str] = "client_start"
    family: ClassVar[Family] = Family.LOCAL

    run: Id
    plan: RunPlan
    code_version: str = ""


class RoundStarted(ClientMessage):
    """The trainer has started to process the first message of *run*."""

    name: ClassVar[str] = "round_started"
    family: ClassVar[Family] = Family.LOCAL

    run: Id
    round: int | None = None


class InferStart(ClientMessage):
    """Command to load and serve the first model. *path* is a file on the client that both agents can read."""

    name: ClassVar[str] = "infer_start"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    path: str
    code_version: str = ""
    """The code version that builds the model; empty: the one that the agent already has."""
    published_in: str = ""
    """The ``traceparent`` of the `model_published` message, which may be much older."""
    term: int = 0
    """The term of the champion. A model that this device rolled back is accepted again only with a higher term."""


class InferUpdate(InferStart):
    """Command to load and check this model while the current one serves, then to replace the current one."""

    name: ClassVar[str] = "infer_update"


class InferReady(ClientMessage):
    """The inference agent has loaded the model and serves it."""

    name: ClassVar[str] = "infer_ready"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    endpoint: str
    code_version: str = ""


class InferRefused(ClientMessage):
    """The inference agent has rejected the model. *serving* is the version that still serves, if there is one."""

    name: ClassVar[str] = "infer_refused"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    reason: str
    serving: int | None = None
    still: ModelRef | None = None
    """The model of the version in *serving*."""
    code_version: str = ""
    not_served: bool = False
    """True if no code of the task can serve the model. The client takes it nevertheless, and trains."""


def not_served_text(model: ModelRef, reason: str) -> str:
    """Describe for users that *model* is not served."""
    return f"version {model.version} is not served: {reason}"
