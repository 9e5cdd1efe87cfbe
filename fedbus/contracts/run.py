"""Runs: training campaigns of a task, of R rounds each.

    requested → recruiting → running → finished, failed, cancelled
                                running –server_lost→ recovering –server_recovered→ running

The workflow scheduler owns the lifecycle. It creates runs, one at a time for each task, and publishes their
transitions when the lifecycle of the task's server changes.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Final, Literal, TypedDict

from pydantic import AwareDatetime, ConfigDict, Field, field_validator

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import Body, LifecycleData, Request
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task.aggregation import AggregationTable

Scalar = bool | int | float | str


class RunPlan(Body):
    """The parameters of a run. They are fixed before the run starts."""

    rounds: int = Field(default=0, ge=0, le=100_000)
    """The number of rounds of the run. 0: the app trains its own number of rounds."""
    app_rounds: int = Field(default=0, ge=0)
    """The number of rounds that the app declares, which its code may ignore; 0: it declares none."""
    quorum: int = Field(default=2, ge=1)
    """Clients that must have joined before training starts."""
    recruit_s: float = Field(default=60.0, gt=0)
    """Limit for the recruiting of the quorum."""
    round_s: float = Field(default=600.0, gt=0)
    """Limit for one message to a client. After it the round continues without the client."""
    max_recoveries: int = Field(default=2, ge=0)
    """How often a lost Flower server is restarted before the run fails."""
    config: dict[str, Scalar] = Field(default_factory=dict)
    """Overrides of the app's run configuration."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The seed of the random number generators of all processes of the run; None: they are not seeded."""
    deterministic: bool = False
    """Add the updates of a round in the order of client names, not of arrival. All of them may be in memory then."""
    aggregation: dict[str, Scalar] = Field(default_factory=dict)
    """Overrides of the keys of ``[tool.fedbus.aggregation]``, such as the mode."""

    @property
    def total_rounds(self) -> int:
        """The number of rounds, as far as it is known before the run; 0 if it is not."""
        return self.rounds or self.app_rounds

    def total_rounds_after(self, done: int, *, is_finished: bool = False) -> int:
        """Return the number of rounds after *done* of them; 0 if it is not known, or the app has another number."""
        if is_finished and not self.rounds:
            return done
        return self.total_rounds if done <= self.total_rounds else 0


MAX_REPORTED_CLIENTS: Final = 200
"""Clients of one round whose metrics and durations are reported. The limit bounds the size of a transition."""


MAX_SHORT_REASON: Final = 24
"""Characters of the reason of each further failed client."""


def shorten_reasons(failures: Mapping[str, str]) -> dict[str, str]:
    """Shorten the reasons of all failures but the first `MAX_REPORTED_CLIENTS`, so that any number fits an event."""
    shortened = dict(failures)
    for client in list(failures)[MAX_REPORTED_CLIENTS:]:
        reason = failures[client]
        shortened[client] = (
            reason if len(reason) <= MAX_SHORT_REASON else f"{reason[: MAX_SHORT_REASON - 1]}…"
        )
    return shortened


class RunOverrides(Body):
    """Values that replace those of the task's plan. A value that is None or absent keeps the task's own."""

    rounds: int | None = Field(default=None, ge=1, le=100_000)
    quorum: int | None = Field(default=None, ge=1)
    recruit_s: float | None = Field(default=None, gt=0)
    round_s: float | None = Field(default=None, gt=0)
    max_recoveries: int | None = Field(default=None, ge=0)
    config: dict[str, Scalar] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    deterministic: bool | None = None
    aggregation: dict[str, Scalar] = Field(default_factory=dict)

    def apply_to(self, plan: RunPlan) -> RunPlan:
        """Apply the overrides to *plan*. *config* and *aggregation* are merged key by key."""
        return plan.model_copy(update=self._changes_to(plan))

    def merge(self, later: "RunOverrides") -> "RunOverrides":
        """Combine both. *later* wins where both set the same value."""
        return self.model_copy(update=later._changes_to(self))  # noqa: SLF001 - of the same class

    def _changes_to(self, earlier: "RunPlan | RunOverrides") -> dict[str, Any]:
        mappings = {"config", "aggregation"}
        changes = self.model_dump(include=set(RunOverrides.model_fields) - mappings, exclude_none=True)
        merged = {name: {**getattr(earlier, name), **getattr(self, name)} for name in mappings}
        return {**changes, **merged}


class RoundResult(Body):
    """The result of one round. Round 0 is the evaluation of the model that the run started from."""

    # A diverged run has infinite or NaN metrics, which JSON would have as null and could not be read.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    round: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = Field(default=0.0, ge=0)
    participants: dict[str, int] = Field(default_factory=dict)
    """Training samples by client."""
    failures: dict[str, str] = Field(default_factory=dict)
    """Reasons of failed updates, by client."""
    evaluation_failure: str = ""
    """Why the clients' evaluation has no result: each client that had to evaluate the model failed. Empty if one
    evaluated it, or none had to."""
    train_s: dict[str, float] = Field(default_factory=dict)
    """Training duration by client."""
    contributions: dict[str, float] = Field(default_factory=dict)
    """Contribution by client, for those that were measured: see ``[tool.fedbus.contribution]``."""
    figures: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metrics that the app reported (``train_loss``, ``eval_accuracy``, …), by client. At most 200 clients, the slowest
    ones."""
    transfer_s: dict[str, float] = Field(default_factory=dict)
    """Time in transit of the message and its reply, by client. The same clients as in *figures*."""
    wait_s: dict[str, float] = Field(default_factory=dict)
    """Time that the last reply waited for the replies of other clients, by client. The same clients as in *figures*."""
    mode: str = ""
    """The aggregation mode: ``deadline``, ``buffered`` or ``async``; empty if it is ``sync``."""
    updates: int = Field(default=0, ge=0)
    """The number of updates in the aggregation, if the mode is not ``sync``. A client may have several."""
    staleness: dict[str, int] = Field(default_factory=dict)
    """The number of aggregations since the client got the model of its last update in this one, by client. Empty if
    the mode is ``sync``."""
    late_merged: int = Field(default=0, ge=0)
    """Updates of an older model in this aggregation."""
    late_dropped: int = Field(default=0, ge=0)
    """Updates of an older model that were dropped since the last aggregation."""

    @property
    def loss(self) -> float | None:
        return self._metric("loss")

    @property
    def accuracy(self) -> float | None:
        return self._metric("accuracy")

    def client_metrics(self, client: str) -> dict[str, float]:
        """Return all values of a client: ``samples``, ``train_s``, ``staleness`` …, and its app's metrics."""
        by_name: dict[str, dict[str, int] | dict[str, float]] = {
            "samples": self.participants,
            "train_s": self.train_s,
            "transfer_s": self.transfer_s,
            "wait_s": self.wait_s,
            "staleness": self.staleness,
        }
        known = {name: float(values[client]) for name, values in by_name.items() if client in values}
        return known | self.figures.get(client, {})

    def _metric(self, name: str) -> float | None:
        """Return the server's own metric, else the one of the clients' evaluation, else of their training."""
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
    """The data of a run. Together with the state, a restarted workflow scheduler continues from it."""

    kind: Literal["run"] = "run"
    run: Id
    plan: RunPlan
    """The plan at the deployed code version. ``recruiting_started`` replaces it with the plan at the run's code
    version."""
    overrides: RunOverrides | None = None
    """Values that replace those of the task's plan. None: *plan* is complete."""
    trigger: str = "manual"
    requested_at: AwareDatetime
    rounds: tuple[RoundResult, ...] = ()
    cohort: tuple[str, ...] = ()
    model: ModelRef | None = None
    """The model version that the run produced."""
    promoted: bool = True
    """True if *model* became champion."""
    code_version: str = ""
    trace_id: str = ""
    traceparent: str = ""
    """The root of the run's trace, so that a restarted workflow scheduler continues the trace."""

    @property
    def key(self) -> str:
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
        _S.REQUESTED: Wait(
            "the server manager to open the run", "no limit; the server manager may be busy or unavailable"
        ),
        _S.RECRUITING: Wait("the quorum of clients", "plan.recruit_s"),
        _S.RUNNING: Wait("the last round", "plan.round_s for each message"),
        _S.RECOVERING: Wait("a new Flower server", "plan.recruit_s"),
    },
    failure_events=frozenset({_E.RUN_REFUSED, _E.RECRUITING_EXPIRED, _E.RUN_FAILED, _E.SERVER_LOST}),
)


# --- requests of users to the workflow scheduler -----------------------------


class RunStarted(Body):
    """Reply to `start_run`: the run is requested."""

    run: Id


class StartRun(Request[RunStarted]):
    """Request to start a run now. A field that is absent keeps the value of the task."""

    name: ClassVar[str] = "start_run"
    responder: ClassVar[AgentName] = AgentName.WORKFLOW_SCHEDULER

    rounds: int | None = Field(default=None, ge=1)
    quorum: int | None = Field(default=None, ge=1)
    config: dict[str, Scalar] = Field(default_factory=dict)
    """Overrides of the app's run configuration."""
    trigger: str = "manual"
    """What started the run, for the event log."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The seed of the run; None: no generator is seeded."""
    deterministic: bool | None = None
    """Add the updates of each round in the order of client names."""
    aggregation: dict[str, Scalar] = Field(default_factory=dict)
    """Overrides of the keys of ``[tool.fedbus.aggregation]``: ``{"mode": "buffered"}``."""

    @field_validator("aggregation")
    @classmethod
    def _check_aggregation(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        AggregationTable.check_overrides(value)
        return value

    @property
    def overrides(self) -> RunOverrides:
        return RunOverrides(
            rounds=self.rounds,
            quorum=self.quorum,
            config=self.config,
            seed=self.seed,
            deterministic=self.deterministic,
            aggregation=self.aggregation,
        )


class RunStopped(Body):
    """Reply to `stop_run`: the run will be cancelled."""

    run: Id


class StopRun(Request[RunStopped]):
    """Request to cancel the run. Its last checkpoint does not become a model version."""

    name: ClassVar[str] = "stop_run"
    responder: ClassVar[AgentName] = AgentName.WORKFLOW_SCHEDULER

    run: Id
    reason: str = "stopped by hand"
