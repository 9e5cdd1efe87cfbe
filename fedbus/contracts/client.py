"""A client: its three agents, what they say to the server and to each other, and their lifecycles.

The client manager decides, the FL client trains, the inference agent serves; serving never
stops for any other lifecycle.
"""

from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from fedbus.contracts.client_metrics import Figures
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import ClientMessage, Facts, Family
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import Content

# --- the client manager -------------------------------------------------------------


class ClientState(StrEnum):
    S0 = "s0"
    PENDING_APPLICATION = "pending_application"
    SERVING = "serving"
    SYNCING = "syncing"
    LEARNING = "learning"
    TERMINATED = "terminated"


class ClientFacts(Facts):
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


_C = ClientState
CLIENT = Lifecycle(
    kind="client",
    owner="client-manager",
    initial=_C.S0,
    arrows={
        (_C.S0, "model_fetched"): _C.PENDING_APPLICATION,
        (_C.S0, "bootstrap_failed"): _C.TERMINATED,
        (_C.PENDING_APPLICATION, "infer_ready"): _C.SERVING,
        (_C.PENDING_APPLICATION, "infer_refused"): _C.SERVING,
        (_C.PENDING_APPLICATION, "infer_retried"): _C.PENDING_APPLICATION,
        (_C.PENDING_APPLICATION, "no_new_model"): _C.SERVING,
        (_C.SERVING, "client_start"): _C.LEARNING,
        (_C.SERVING, "model_published"): _C.PENDING_APPLICATION,
        (_C.SERVING, "model_returned"): _C.SERVING,
        (_C.SERVING, "code_published"): _C.SYNCING,
        (_C.SYNCING, "code_ready"): _C.SERVING,
        (_C.SYNCING, "code_refused"): _C.SERVING,
        (_C.LEARNING, "fin_train"): _C.PENDING_APPLICATION,
        (_C.LEARNING, "fail_train"): _C.SERVING,
        (_C.LEARNING, "trainer_lost"): _C.SERVING,
        (_C.LEARNING, "deadline"): _C.SERVING,
        (_C.SERVING, "restarted"): _C.S0,
        (_C.PENDING_APPLICATION, "restarted"): _C.S0,
        (_C.SYNCING, "restarted"): _C.S0,
        (_C.LEARNING, "restarted"): _C.S0,
        (_C.TERMINATED, "restarted"): _C.S0,
    },
    waits={
        _C.S0: Wait("the server and the model repository", "bootstrap_s"),
        _C.PENDING_APPLICATION: Wait("the inference agent to take the model", "apply_s"),
        _C.SYNCING: Wait("the task's code", "sync_s"),
        _C.LEARNING: Wait("the run to end", "learn_s"),
    },
    failures=frozenset(
        {
            "bootstrap_failed",
            "code_refused",
            "infer_refused",
            "model_returned",
            "fail_train",
            "trainer_lost",
            "deadline",
        }
    ),
)


# --- the FL client ------------------------------------------------------------------


class FlClientState(StrEnum):
    WAITING = "waiting"
    PENDING = "pending"
    TRAINING = "training"
    FINISHED = "finished"


class FlClientFacts(Facts):
    """All there is to know of a client's training in one task."""

    kind: Literal["fl_client"] = "fl_client"
    client: Id
    run: Id | None = None

    @property
    def thing(self) -> str:
        return f"{self.client}.{self.task}"


_F = FlClientState
FL_CLIENT = Lifecycle(
    kind="fl_client",
    owner="flower-client",
    initial=_F.WAITING,
    arrows={
        (_F.WAITING, "client_start"): _F.PENDING,
        (_F.PENDING, "round_started"): _F.TRAINING,
        (_F.TRAINING, "run_finished"): _F.FINISHED,
        (_F.FINISHED, "reported"): _F.WAITING,
        (_F.PENDING, "failed"): _F.WAITING,
        (_F.TRAINING, "failed"): _F.WAITING,
    },
    waits={
        _F.PENDING: Wait("the first message of the run", "plan.recruit_s and plan.round_s"),
        _F.TRAINING: Wait("the run to end", "learn_s"),
    },
    failures=frozenset({"failed"}),
)


# --- the inference agent ---------------------------------------------------------------


class InferenceState(StrEnum):
    EMPTY = "empty"
    SERVING = "serving"
    UPDATING = "updating"


class InferenceFacts(Facts):
    """All there is to know of a client's predictions in one task."""

    kind: Literal["inference"] = "inference"
    client: Id
    model: ModelRef | None = None
    endpoint: str = ""
    """Where predictions are asked for: ``http://127.0.0.1:8080``."""

    @property
    def thing(self) -> str:
        return f"{self.client}.{self.task}"


_I = InferenceState
INFERENCE = Lifecycle(
    kind="inference",
    owner="inference",
    initial=_I.EMPTY,
    arrows={
        (_I.EMPTY, "infer_start"): _I.SERVING,
        (_I.SERVING, "infer_update"): _I.UPDATING,
        (_I.UPDATING, "model_loaded"): _I.SERVING,
        (_I.UPDATING, "load_refused"): _I.SERVING,
        (_I.SERVING, "model_returned"): _I.SERVING,
        (_I.SERVING, "restarted"): _I.EMPTY,
        (_I.UPDATING, "restarted"): _I.EMPTY,
    },
    waits={_I.UPDATING: Wait("the new model to load and to answer the probe", "apply_s")},
    failures=frozenset({"load_refused", "model_returned"}),
)


# --- client → server ----------------------------------------------------------------------


class Joined(ClientMessage):
    """This client's trainer is up and listens for the messages of *run*."""

    word: ClassVar[str] = "joined"
    family: ClassVar[Family] = Family.CLIENT

    run: Id
    code_version: str = ""


class Declined(ClientMessage):
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
    content: Content | None = None
    error_code: int | None = None
    error_reason: str = ""
    train_s: float = Field(default=0.0, ge=0)
    left_out: int = Field(default=0, ge=0)
    """Captured rows that this training did not get, since they are not as the task's checks want them."""
    figures: Figures = Field(default_factory=dict)
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
