"""A client: its three agents, what they say to the server and to each other, and their lifecycles.

The client manager decides, the FL client trains, the inference agent serves; serving never
stops for any other lifecycle.
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
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import MessageContent

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
    """All there is to know of a client in one task."""

    kind: Literal["client"] = "client"
    client: Id
    model: ModelRef | None = None
    """The version that is served, or about to be."""
    run: Id | None = None
    code_version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    """What the device was given to be told apart by: ``{"site": "lab"}``."""

    @property
    def thing(self) -> str:
        return f"{self.client}.{self.task}"


class ClientChanges(TypedDict, total=False):
    """The data of a client that a transition may change."""

    model: ModelRef | None
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
        _CE.INFER_READY: {"model", "code_version"},
        _CE.INFER_REFUSED: {"model", "code_version"},
        _CE.INFER_RETRIED: {"model", "code_version"},
        _CE.NO_NEW_MODEL: {"model"},
        _CE.CLIENT_START: {"run"},
        _CE.MODEL_PUBLISHED: {"model"},
        _CE.MODEL_RETURNED: {"model"},
        _CE.CODE_READY: {"model", "code_version"},
        _CE.CODE_REFUSED: {"model"},
        _CE.FIN_TRAIN: {"run", "model"},
        _CE.FAIL_TRAIN: {"run", "model"},
        _CE.TRAINER_LOST: {"run", "model"},
        _CE.DEADLINE: {"run", "model"},
    },
    waits={
        _C.S0: Wait("the server and the model repository", "bootstrap_s"),
        _C.PENDING_APPLICATION: Wait("the inference agent to take the model", "apply_s"),
        _C.SYNCING: Wait("the task's code", "sync_s"),
        _C.LEARNING: Wait("the run to end", "learn_s"),
    },
    failures=frozenset(
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
    """All there is to know of a client's training in one task."""

    kind: Literal["fl_client"] = "fl_client"
    client: Id
    run: Id | None = None

    @property
    def thing(self) -> str:
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
        _F.PENDING: Wait("the first message of the run", "plan.recruit_s and plan.round_s"),
        _F.TRAINING: Wait("the run to end", "learn_s"),
    },
    failures=frozenset({_FE.FAILED}),
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
    MODEL_RETURNED = "model_returned"


class InferenceData(LifecycleData):
    """All there is to know of a client's predictions in one task."""

    kind: Literal["inference"] = "inference"
    client: Id
    model: ModelRef | None = None
    endpoint: str = ""
    """Where predictions are asked for: ``http://127.0.0.1:8080``."""

    @property
    def thing(self) -> str:
        return f"{self.client}.{self.task}"


class InferenceChanges(TypedDict, total=False):
    """The data of a client's predictions that a transition may change."""

    model: ModelRef | None
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
        (_I.SERVING, _IE.MODEL_RETURNED): _I.SERVING,
        (_I.SERVING, _IE.RESTARTED): _I.EMPTY,
        (_I.UPDATING, _IE.RESTARTED): _I.EMPTY,
    },
    changes={
        _IE.RESTARTED: {"model", "endpoint"},
        _IE.INFER_START: {"model", "endpoint"},
        _IE.MODEL_LOADED: {"model"},
        _IE.MODEL_RETURNED: {"model"},
    },
    waits={_I.UPDATING: Wait("the new model to load and to answer the probe", "apply_s")},
    failures=frozenset({_IE.LOAD_REFUSED, _IE.MODEL_RETURNED}),
)


# --- client → server ----------------------------------------------------------------------


class ClientJoined(ClientMessage):
    """This client's trainer is up and listens for the messages of *run*."""

    word: ClassVar[str] = "joined"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    code_version: str = ""


class ClientDeclined(ClientMessage):
    """This client does not take part in *run*, and why."""

    word: ClassVar[str] = "declined"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    reason: str
    rule: str = ""
    """The task's rule that does not hold on it; empty where there is another reason."""
    facts: dict[str, float] = Field(default_factory=dict)
    """The figures that the rule was tried with, by its words."""


class RoundReply(ClientMessage):
    """A Flower reply: content, or an error with Flower's code and a reason."""

    word: ClassVar[str] = "round_reply"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    round: int | None = None
    message_id: str
    reply_to: str
    created_at: float
    ttl_s: float
    content: MessageContent | None = None
    error_code: int | None = None
    error_reason: str = ""
    train_s: float = Field(default=0.0, ge=0)
    left_out: int = Field(default=0, ge=0)
    """Captured rows that this training did not get, since they are not as the task's checks want them."""
    figures: ClientMetrics = Field(default_factory=dict)
    """What the ClientApp said of its training or evaluation: ``train_loss``, ``eval_accuracy``, …"""


class FinTrain(ClientMessage):
    """The run is over for this client, and its trainer gave its memory back."""

    word: ClassVar[str] = "fin_train"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    rounds: int = 0
    new_model: bool = True
    """Whether a new model is to be served after it."""


class FailTrain(ClientMessage):
    """This client is out of *run*; the run goes on without it."""

    word: ClassVar[str] = "fail_train"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    reason: str
    trainer_lost: bool = False
    """Whether its training process died, rather than said no."""


class Heartbeat(ClientMessage):
    """This client still trains *run*. Not kept: one that is late says nothing."""

    word: ClassVar[str] = "heartbeat"
    family: ClassVar[Family] = Family.CLIENT
    durable: ClassVar[bool] = False

    run: Id


# --- between the agents of one client ---------------------------------------------------------


class ClientStart(ClientMessage):
    """Train *run*: the client manager to the FL client."""

    word: ClassVar[str] = "client_start"
    family: ClassVar[Family] = Family.LOCAL

    run: Id
    plan: RunPlan
    code_version: str = ""


class RoundStarted(ClientMessage):
    """The first message of *run* is being worked on: the trainer to its FL client."""

    word: ClassVar[str] = "round_started"
    family: ClassVar[Family] = Family.LOCAL

    run: Id
    round: int | None = None


class InferStart(ClientMessage):
    """Serve this model, the first one. *path* is a file on the client that both agents can read."""

    word: ClassVar[str] = "infer_start"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    path: str
    code_version: str = ""
    """The task's code to build the model with; left out: what the agent has."""
    published_in: str = ""
    """The ``traceparent`` of the word that the version is out, which may be of long before."""
    term: int = 0
    """Which champion it is: a model that was returned from is tried again when it was named anew since."""


class InferUpdate(InferStart):
    """Load and try this model beside the one that serves, then swap."""

    word: ClassVar[str] = "infer_update"


class InferReady(ClientMessage):
    """The model answers."""

    word: ClassVar[str] = "infer_ready"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    endpoint: str
    code_version: str = ""


class InferRefused(ClientMessage):
    """The model was not taken; *serving* is the version that still answers, if there is one."""

    word: ClassVar[str] = "infer_refused"
    family: ClassVar[Family] = Family.LOCAL

    model: ModelRef
    reason: str
    serving: int | None = None
    still: ModelRef | None = None
    """The model of that version."""
    code_version: str = ""
