"""Scheduling of a task's runs: four tables of ``[tool.fedbus]``, and the lifecycle of the schedule.

    [tool.fedbus.eligibility]    which devices take part: a rule that each device evaluates
    [tool.fedbus.schedule]       when runs start automatically
    [tool.fedbus.selection]      which of the joined clients train in a round, and the weight of their updates
    [tool.fedbus.contribution]   how the contribution of each client is measured

    schedule: watching –triggered→ due –fired / skipped / rescheduled→ watching –planned→ watching

`fedbus.contracts.expressions` defines the languages of rules and triggers; docs/scheduling.md explains them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal, Self, TypedDict
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.expressions.eligibility_rule import RULE_VARIABLES, parse_rule
from fedbus.contracts.expressions.trigger import IntervalCondition, Trigger, parse_trigger
from fedbus.contracts.identifiers import Id
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import Body, LifecycleData
from fedbus.contracts.task.base import ConfigSection

CLOCK_VARIABLES: Final = {name: RULE_VARIABLES[name] for name in ("hour", "weekday")}
"""The variables that quiet hours may use."""


def _validate_rule(text: str) -> str:
    parse_rule(text)
    return text


def _validate_clock_rule(text: str) -> str:
    parse_rule(text, variables=CLOCK_VARIABLES)
    return text


def _validate_trigger(text: str) -> str:
    parse_trigger(text)
    return text


def _validate_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError(f"unknown time zone {name!r}: use a name such as Europe/Berlin") from None
    return name


class EligibilityTable(ConfigSection):
    """Which devices take part in runs."""

    rule: Annotated[str, AfterValidator(_validate_rule)] | None = None
    """The rule that a device evaluates when a run recruits. Default: every device takes part."""
    again_s: float = Field(default=60.0, gt=0)
    """Seconds between two evaluations of the rule while a run recruits."""


class ScheduleTable(ConfigSection):
    """When runs start automatically. ``every-s = 3600`` is a short form of ``when = "every 1h"``."""

    every_s: float | None = Field(default=None, gt=0)
    """Seconds from the end of a run to the start of the next. The first run starts as soon as there is a model."""
    when: Annotated[str, AfterValidator(_validate_trigger)] | None = None
    """The trigger: conditions such as ``cron '0 3 * * *'``, ``every 6h`` or ``labelled >= 64 on 3 clients``, joined by
    ``and`` and ``or``."""
    timezone: Annotated[str, AfterValidator(_validate_timezone)] = "UTC"
    """The time zone of ``cron`` and of the quiet hours."""
    at_most: int | None = Field(default=None, ge=1)
    """The total number of runs that the schedule may start. Default: no limit."""
    debounce_s: float = Field(default=0.0, ge=0)
    """Seconds without a new report of a device before a due run starts. After ten times as long it starts anyway."""
    again_s: float = Field(default=24 * 3600.0, gt=0)
    """Seconds after a run until drift or a low live accuracy that the run did not remove can start another run."""
    quiet: Annotated[str, AfterValidator(_validate_clock_rule)] | None = None
    """Quiet hours, as a rule with ``hour`` and ``weekday``. A run that becomes due in them starts at their end."""
    overlap: Literal["skip", "queue", "cancel-running"] = "queue"
    """What happens when a run becomes due while another one is active. ``skip``: skip the new run. ``queue``: start it
    afterwards. ``cancel-running``: cancel the active run."""
    missed: Literal["skip", "once", "all"] = "once"
    """How many runs start for ``cron`` times that passed while no scheduler was running. ``skip``: none. ``once``: one.
    ``all``: one for each."""
    on_new_code: bool = True
    """If true, a trial run starts as soon as the clients of a rollout stage have the candidate code."""

    @model_validator(mode="after")
    def _check_exclusive_keys(self) -> Self:
        if self.every_s is not None and self.when is not None:
            raise ValueError(
                f'every-s and when exclude each other: use only when = "({self.when}) or every {self.every_s:g}s"'
            )
        return self

    @property
    def trigger(self) -> Trigger | None:
        """The parsed trigger; None if runs do not start automatically."""
        if self.when is not None:
            return parse_trigger(self.when)
        return IntervalCondition(self.every_s) if self.every_s is not None else None

    @property
    def rule(self) -> "ScheduleRule | None":
        """The published form of the schedule; None if runs do not start automatically."""
        if self.trigger is None:
            return None
        return ScheduleRule(
            when=self.when or str(self.trigger),
            timezone=self.timezone,
            quiet=self.quiet or "",
            debounce_s=self.debounce_s,
            overlap=self.overlap,
            missed=self.missed,
            at_most=self.at_most,
        )


@dataclass(frozen=True)
class ScheduleOverrides:
    """Values that replace those of a task's schedule."""

    every_s: float | None = None
    at_most: int | None = None

    def apply_to(self, own: ScheduleTable) -> ScheduleTable:
        """Apply the overrides to *own*; raises ValidationError if they conflict with it."""
        overrides = {"every-s": self.every_s, "at-most": self.at_most}
        changes = {name: value for name, value in overrides.items() if value is not None}
        return type(own).model_validate(own.model_dump(exclude_unset=True) | changes)


class SelectionTable(ConfigSection):
    """Which of the joined clients train in a round, and the weight of their updates."""

    clients: int | None = Field(default=None, ge=1)
    """The maximum number of clients in a round. Default: the app's strategy selects."""
    by: Literal["contribution", "reliability", "data"] = "reliability"
    """The score: clients with a higher score are selected first."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """The share of places for the clients that have waited longest, independent of their score."""
    weigh_by: Literal["samples", "contribution", "reliability"] = "samples"
    """The weight of an update: its samples, or its samples multiplied by the client's score."""


class ContributionTable(ConfigSection):
    """How the contribution of each client is measured: aggregate without it, evaluate on the server's test data."""

    every: int = Field(default=0, ge=0)
    """The number of rounds between measurements; 0: never measure. The strategy needs an ``evaluate_fn``."""
    clients: int = Field(default=10, ge=1)
    """The number of clients in a measurement, starting with those measured longest ago."""
    seconds: float = Field(default=30.0, gt=0)
    """The time after which a measurement starts no further client."""
    permutations: int = Field(default=0, ge=0)
    """0: leave out each client once. More: compute Shapley values from this number of random orders. The cost is this
    number times the number of clients."""


# --- the lifecycle ------------------------------------------------------------------------------


class ScheduleState(StrEnum):
    WATCHING = "watching"
    DUE = "due"


class ScheduleRule(Body):
    """The schedule of a task as it is published, see `ScheduleTable`."""

    when: str
    timezone: str = "UTC"
    quiet: str = ""
    debounce_s: float = 0.0
    overlap: str = "queue"
    missed: str = "once"
    at_most: int | None = None


class ScheduleEvent(StrEnum):
    STARTED = "started"
    PLANNED = "planned"
    TRIGGERED = "triggered"
    POSTPONED = "postponed"
    FIRED = "fired"
    SKIPPED = "skipped"
    RESCHEDULED = "rescheduled"
    TAKEN_OVER = "taken_over"


class ScheduleData(LifecycleData):
    """The data of a task's schedule. All other inputs of the workflow scheduler are in the event log."""

    kind: Literal["schedule"] = "schedule"
    holder: str = ""
    """The workflow scheduler that has the lease, the only one that may publish transitions of the schedule."""
    since: AwareDatetime
    """Events after this time count for the next run."""
    clock_since: AwareDatetime
    """``cron`` times after this time count for the next run."""
    due_since: AwareDatetime | None = None
    """When the trigger became true; None while it is false."""
    cause: str = ""
    """The conditions that made the trigger true, as text."""
    started: int = 0
    """The number of runs that the schedule has started."""
    run: Id | None = None
    """The last run that the schedule started."""
    labelled: dict[str, int] = Field(default_factory=dict)
    """The *labelled_ever* counter of each client at *since*. Only newer rows count."""
    unlabelled: dict[str, int] = Field(default_factory=dict)
    """The *unlabelled_ever* counter of each client at *since*. Only newer rows count."""
    databases: dict[str, str] = Field(default_factory=dict)
    """The id of the database of these counters, by client. In another database all rows are new."""
    drifted: tuple[str, ...] = ()
    """The clients with drift at *since*."""
    accuracy: dict[str, float] = Field(default_factory=dict)
    """The live accuracy of each client's model at *since*."""
    code_version: str = ""
    """The deployed code version at *since*."""
    rule: ScheduleRule | None = None
    next_at: AwareDatetime | None = None
    """While watching: when a run can start because of time alone; None if the trigger also needs an event."""
    awaits: tuple[str, ...] = ()
    """While watching: the conditions that are not true yet, with their progress."""
    fired_at: AwareDatetime | None = None
    """When the schedule last started a run."""
    fired_for: str = ""
    """The cause of that run."""
    traceparent: str = ""
    """The trace context of the transition to ``due``, in which the run continues."""

    @property
    def key(self) -> str:
        return self.task


class ScheduleChanges(TypedDict, total=False):
    """The data of a task's schedule that a transition may change."""

    holder: str
    since: AwareDatetime
    clock_since: AwareDatetime
    due_since: AwareDatetime | None
    cause: str
    started: int
    run: Id | None
    labelled: dict[str, int]
    unlabelled: dict[str, int]
    databases: dict[str, str]
    drifted: tuple[str, ...]
    accuracy: dict[str, float]
    code_version: str
    rule: ScheduleRule | None
    next_at: AwareDatetime | None
    awaits: tuple[str, ...]
    fired_at: AwareDatetime | None
    fired_for: str
    traceparent: str


_S = ScheduleState
_E = ScheduleEvent
_BASELINE = frozenset(
    {
        "since",
        "clock_since",
        "due_since",
        "cause",
        "labelled",
        "unlabelled",
        "databases",
        "drifted",
        "accuracy",
        "code_version",
        "next_at",
        "awaits",
    }
)
"""The baseline of the trigger. It is reset when the schedule starts or skips a run."""
SCHEDULE = Lifecycle[ScheduleState, ScheduleEvent, ScheduleData, ScheduleChanges](
    kind="schedule",
    owner=AgentName.WORKFLOW_SCHEDULER,
    initial=_S.WATCHING,
    creation=_E.STARTED,
    data=ScheduleData,
    arrows={
        (_S.WATCHING, _E.PLANNED): _S.WATCHING,
        (_S.WATCHING, _E.TRIGGERED): _S.DUE,
        (_S.DUE, _E.POSTPONED): _S.DUE,
        (_S.DUE, _E.FIRED): _S.WATCHING,
        (_S.DUE, _E.SKIPPED): _S.WATCHING,
        (_S.WATCHING, _E.RESCHEDULED): _S.WATCHING,
        (_S.DUE, _E.RESCHEDULED): _S.WATCHING,
        (_S.WATCHING, _E.TAKEN_OVER): _S.WATCHING,
        (_S.DUE, _E.TAKEN_OVER): _S.DUE,
    },
    changes={
        _E.PLANNED: {"next_at", "awaits"},
        _E.TRIGGERED: {"due_since", "cause", "traceparent"},
        _E.FIRED: _BASELINE | {"started", "run", "fired_at", "fired_for"},
        _E.SKIPPED: _BASELINE,
        _E.RESCHEDULED: {"clock_since", "due_since", "cause", "rule", "next_at", "awaits"},
        _E.TAKEN_OVER: {"holder", "clock_since", "rule"},
    },
    waits={
        _S.DUE: Wait(
            "the end of the quiet hours, of the debounce time or of the previous run",
            "the deadline, if there is one",
        )
    },
    between_runs=frozenset(_S),
)
