"""Runs: training campaigns of a task, R rounds each.

    requested → recruiting → running → finished, failed, cancelled
                                running –server_lost→ recovering –server_recovered→ running

The workflow scheduler owns the lifecycle: it alone makes runs, one at a time per task, and
moves them by what the task's server says of itself.
"""

from enum import StrEnum
from typing import ClassVar, Final, Literal, TypedDict

from pydantic import AwareDatetime, Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import Body, LifecycleData, Request
from fedbus.contracts.model import ModelRef

Scalar = bool | int | float | str


class RunPlan(Body):
    """What a run is to be, decided before it starts and never changed."""

    rounds: int = Field(default=3, ge=1, le=100_000)
    quorum: int = Field(default=2, ge=1)
    """Clients that must have joined before training starts."""
    recruit_s: float = Field(default=60.0, gt=0)
    """How long the quorum may take to come together."""
    round_s: float = Field(default=600.0, gt=0)
    """How long a client may take over one message of the server; then the round goes on without it."""
    max_recoveries: int = Field(default=2, ge=0)
    """How often a run's Flower server is started again after it was lost."""
    config: dict[str, Scalar] = Field(default_factory=dict)
    """Overrides of the Flower app's run configuration."""


MAX_REPORTED_CLIENTS: Final = 200
"""Of how many clients of one round the figures and the times are told: a transition carries them."""


class RunOverrides(Body):
    """What a run is to be in the place of what its task says: of what is left out, the task's is so."""

    rounds: int | None = Field(default=None, ge=1, le=100_000)
    quorum: int | None = Field(default=None, ge=1)
    recruit_s: float | None = Field(default=None, gt=0)
    round_s: float | None = Field(default=None, gt=0)
    max_recoveries: int | None = Field(default=None, ge=0)
    config: dict[str, Scalar] = Field(default_factory=dict)

    def over(self, plan: RunPlan) -> RunPlan:
        """*plan* with these in it; the values of *config* are put in one by one."""
        given = self.model_dump(include=set(RunOverrides.model_fields) - {"config"}, exclude_none=True)
        return plan.model_copy(update={**given, "config": {**plan.config, **self.config}})

    def merge(self, later: "RunOverrides") -> "RunOverrides":
        """Both, and *later* where they say of the same."""
        given = later.model_dump(include=set(RunOverrides.model_fields) - {"config"}, exclude_none=True)
        return self.model_copy(update={**given, "config": {**self.config, **later.config}})


class RoundResult(Body):
    """What one round came to. Round 0 is the model that the run began with."""

    round: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = Field(default=0.0, ge=0)
    participants: dict[str, int] = Field(default_factory=dict)
    """Samples by client."""
    failures: dict[str, str] = Field(default_factory=dict)
    """Reasons by client."""
    train_s: dict[str, float] = Field(default_factory=dict)
    """How long the training took each client."""
    contributions: dict[str, float] = Field(default_factory=dict)
    """What each update was worth to the aggregate, of those that were looked at: see ``[tool.fedbus.contribution]``."""
    figures: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What each ClientApp said of itself: ``train_loss``, ``eval_accuracy``, …; of the `CLIENTS_TOLD` slowest."""
    transfer_s: dict[str, float] = Field(default_factory=dict)
    """How long what each client was asked and answered took on the way; of the same clients."""
    wait_s: dict[str, float] = Field(default_factory=dict)
    """How long each client's last answer waited for the others; of the same clients."""

    @property
    def loss(self) -> float | None:
        return self._metric("loss")

    @property
    def accuracy(self) -> float | None:
        return self._metric("accuracy")

    def of_client(self, client: str) -> dict[str, float]:
        """All figures of one client: ``samples``, ``train_s``, ``transfer_s``, ``wait_s``, and what its app said."""
        by_name: dict[str, dict[str, int] | dict[str, float]] = {
            "samples": self.participants,
            "train_s": self.train_s,
            "transfer_s": self.transfer_s,
            "wait_s": self.wait_s,
        }
        known = {name: float(of[client]) for name, of in by_name.items() if client in of}
        return known | self.figures.get(client, {})

    def _metric(self, name: str) -> float | None:
        """The server's own figure if it has one, else the clients' evaluation, else their training."""
        return next(
            (self.metrics[key] for key in (name, f"eval_{name}", f"train_{name}") if key in self.metrics),
            None,
        )


class RunState(StrEnum):
    REQUESTED = "requested"
    RECRUITING = "recruiting"
    RUNNING = "running"
    RECOVERING = "recovering"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RunEvent(StrEnum):
    REQUESTED = "requested"
    RECRUITING_STARTED = "recruiting_started"
    RUN_REFUSED = "run_refused"
    QUORUM_REACHED = "quorum_reached"
    RECRUITING_EXPIRED = "recruiting_expired"
    ROUND_FINISHED = "round_finished"
    SERVER_LOST = "server_lost"
    SERVER_RECOVERED = "server_recovered"
    RUN_FINISHED = "run_finished"
    RUN_FAILED = "run_failed"
    CANCELLED = "cancelled"


class RunData(LifecycleData):
    """All there is to know of a run: with its state, what a restarted scheduler goes on from."""

    kind: Literal["run"] = "run"
    run: Id
    plan: RunPlan
    """As the run was asked for, by the code that everybody was on; as it is, from its opening on."""
    overrides: RunOverrides | None = None
    """What was asked for in the place of what the task says; None: the plan is the whole of it."""
    trigger: str = "manual"
    requested_at: AwareDatetime
    rounds: tuple[RoundResult, ...] = ()
    cohort: tuple[str, ...] = ()
    model: ModelRef | None = None
    """The version that the run came to."""
    promoted: bool = True
    """Whether that version became the one that is served."""
    code_version: str = ""
    trace_id: str = ""
    traceparent: str = ""
    """Where the run's trace begins, so that a restarted scheduler stays in it."""

    @property
    def thing(self) -> str:
        return self.run


class RunChanges(TypedDict, total=False):
    """The data of a run that a transition may change."""

    plan: RunPlan
    rounds: tuple[RoundResult, ...]
    cohort: tuple[str, ...]
    model: ModelRef | None
    promoted: bool
    code_version: str


_S = RunState
_E = RunEvent
RUN = Lifecycle[RunState, RunEvent, RunData, RunChanges](
    kind="run",
    owner=AgentName.WORKFLOW_SCHEDULER,
    initial=_S.REQUESTED,
    creation=_E.REQUESTED,
    data=RunData,
    arrows={
        (_S.REQUESTED, _E.RECRUITING_STARTED): _S.RECRUITING,
        (_S.REQUESTED, _E.RUN_REFUSED): _S.FAILED,
        (_S.REQUESTED, _E.CANCELLED): _S.CANCELLED,
        (_S.RECRUITING, _E.QUORUM_REACHED): _S.RUNNING,
        (_S.RECRUITING, _E.RECRUITING_EXPIRED): _S.FAILED,
        (_S.RECRUITING, _E.RUN_FAILED): _S.FAILED,
        (_S.RECRUITING, _E.CANCELLED): _S.CANCELLED,
        (_S.RUNNING, _E.ROUND_FINISHED): _S.RUNNING,
        (_S.RUNNING, _E.RUN_FINISHED): _S.FINISHED,
        (_S.RUNNING, _E.RUN_FAILED): _S.FAILED,
        (_S.RUNNING, _E.CANCELLED): _S.CANCELLED,
        (_S.RUNNING, _E.SERVER_LOST): _S.RECOVERING,
        (_S.RECOVERING, _E.SERVER_RECOVERED): _S.RUNNING,
        (_S.RECOVERING, _E.RUN_FAILED): _S.FAILED,
        (_S.RECOVERING, _E.CANCELLED): _S.CANCELLED,
    },
    changes={
        _E.RECRUITING_STARTED: {"plan", "code_version"},
        _E.QUORUM_REACHED: {"cohort"},
        _E.ROUND_FINISHED: {"rounds", "cohort"},
        _E.RUN_FINISHED: {"model", "promoted"},
    },
    waits={
        _S.REQUESTED: Wait("the server manager to open the run", "for as long as it is busy, or away"),
        _S.RECRUITING: Wait("the quorum of clients", "plan.recruit_s"),
        _S.RUNNING: Wait("the last round", "plan.round_s, for each message"),
        _S.RECOVERING: Wait("a new Flower server", "plan.recruit_s"),
    },
    failures=frozenset({_E.RUN_REFUSED, _E.RECRUITING_EXPIRED, _E.RUN_FAILED, _E.SERVER_LOST}),
)


# --- what a user asks of the scheduler ---------------------------------------


class RunStarted(Body):
    """The answer to start_run."""

    run: Id


class StartRun(Request):
    """Start a run now. Fields left out are the task's own."""

    word: ClassVar[str] = "start_run"
    server: ClassVar[AgentName] = AgentName.WORKFLOW_SCHEDULER
    answer: ClassVar[type[Body]] = RunStarted

    rounds: int | None = Field(default=None, ge=1)
    quorum: int | None = Field(default=None, ge=1)
    config: dict[str, Scalar] = Field(default_factory=dict)
    trigger: str = "manual"

    @property
    def overrides(self) -> RunOverrides:
        return RunOverrides(rounds=self.rounds, quorum=self.quorum, config=self.config)


class RunStopped(Body):
    """The answer to stop_run: the run will be cancelled."""

    run: Id


class StopRun(Request):
    """Cancel the run: what its last round came to is not published."""

    word: ClassVar[str] = "stop_run"
    server: ClassVar[AgentName] = AgentName.WORKFLOW_SCHEDULER
    answer: ClassVar[type[Body]] = RunStopped

    run: Id
    reason: str = "stopped by hand"
