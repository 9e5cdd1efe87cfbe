"""Who takes part in a task's runs and when those start: four parts of ``[tool.fedbus]``, and the schedule's lifecycle.

    [tool.fedbus.eligibility]    which devices take part: a rule, tried on each device
    [tool.fedbus.schedule]       when runs start by themselves
    [tool.fedbus.selection]      which of those that joined train in a round, and what their updates weigh
    [tool.fedbus.contribution]   how it is found out what each client brings

    schedule: watching –triggered→ due –fired / skipped / rescheduled→ watching –planned→ watching

The languages of the rule and the trigger stand in `rules` and `triggers`; docs/scheduling.md shows them.
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
"""All that quiet hours may speak of."""


def _validate_rule(text: str) -> str:
    parse_rule(text)
    return text


def _validate_clock_rule(text: str) -> str:
    parse_rule(text, words=CLOCK_VARIABLES)
    return text


def _validate_trigger(text: str) -> str:
    parse_trigger(text)
    return text


def _validate_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError(f"there is no time zone {name!r}: write one as in Europe/Berlin") from None
    return name


class EligibilityTable(ConfigSection):
    """Which devices take part in runs."""

    rule: Annotated[str, AfterValidator(_validate_rule)] | None = None
    """Tried on the device when a run invites it; left out: every device takes part."""
    again_s: float = Field(default=60.0, gt=0)
    """While a run takes in clients, how long until a device that may not take part looks again."""


class ScheduleTable(ConfigSection):
    """When runs start by themselves: *when* says so in full, *every_s* is short for ``every …``."""

    every_s: float | None = Field(default=None, gt=0)
    """So long after the last run ended; the first as soon as there is a model."""
    when: Annotated[str, AfterValidator(_validate_trigger)] | None = None
    """What starts runs: ``cron '0 3 * * *'``, ``every 6h``, ``labelled >= 64 on 3 clients``, joined by and, or."""
    timezone: Annotated[str, AfterValidator(_validate_timezone)] = "UTC"
    """Of cron and of the quiet hours."""
    at_most: int | None = Field(default=None, ge=1)
    """How many runs the schedule starts in all."""
    debounce_s: float = Field(default=0.0, ge=0)
    """How long nothing new must have come of the devices before a run starts; ten times as long at most."""
    again_s: float = Field(default=24 * 3600.0, gt=0)
    """How long after a run what it did not cure, drift or a poor live accuracy, starts another."""
    quiet: Annotated[str, AfterValidator(_validate_clock_rule)] | None = None
    """When no run starts, as a rule of hour and weekday; what comes due in between starts at the end."""
    overlap: Literal["skip", "queue", "cancel-running"] = "queue"
    """What becomes of a run that is due while another is under way."""
    missed: Literal["skip", "once", "all"] = "once"
    """What becomes of the moments of cron that came while no scheduler was there."""
    on_new_code: bool = True
    """Whether new code is tried by a run of its own, as soon as the clients of a stage have it."""

    @model_validator(mode="after")
    def _check_exclusive_keys(self) -> Self:
        if self.every_s is not None and self.when is not None:
            raise ValueError(f'write every-s into when: when = "({self.when}) or every {self.every_s:g}s"')
        return self

    @property
    def trigger(self) -> Trigger | None:
        """What starts runs, or None where nothing does."""
        if self.when is not None:
            return parse_trigger(self.when)
        return IntervalCondition(self.every_s) if self.every_s is not None else None

    @property
    def rule(self) -> "ScheduleRule | None":
        """The same as others are told of it; None where nothing starts runs."""
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
    """What stands in the place of just these keys of a task's schedule."""

    every_s: float | None = None
    at_most: int | None = None

    def over(self, own: ScheduleTable) -> ScheduleTable:
        """*own* with these in it; raises ValidationError where they do not go together."""
        asked = {"every-s": self.every_s, "at-most": self.at_most}
        given = {name: value for name, value in asked.items() if value is not None}
        return type(own).model_validate(own.model_dump(exclude_unset=True) | given)


class SelectionTable(ConfigSection):
    """Which of the clients that joined train in a round, and what their updates weigh."""

    clients: int | None = Field(default=None, ge=1)
    """How many at most; left out: as the app's strategy chooses."""
    by: Literal["contribution", "reliability", "data"] = "reliability"
    """Whose score is higher is chosen."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """The share of places that goes to those who have waited longest, whatever their score."""
    weigh_by: Literal["samples", "contribution", "reliability"] = "samples"
    """What an update weighs: its samples, or its samples times the client's score."""


class ContributionTable(ConfigSection):
    """How it is found out what each client brings to the aggregate: by leaving it out, on the server's test data."""

    every: int = Field(default=0, ge=0)
    """Every so many rounds; 0: never. It takes a strategy that is given an evaluate_fn."""
    clients: int = Field(default=10, ge=1)
    """How many clients are looked at in one such round, those first that were not for longest."""
    seconds: float = Field(default=30.0, gt=0)
    """After which no further client is looked at in that round."""
    permutations: int = Field(default=0, ge=0)
    """0: each client is left out once. More: Shapley values by so many random orders, which cost as many
    times the clients."""


# --- the lifecycle ------------------------------------------------------------------------------


class ScheduleState(StrEnum):
    WATCHING = "watching"
    DUE = "due"


class ScheduleRule(Body):
    """What a task's schedule says, see `ScheduleTable`: for whoever wants to know when the next run starts."""

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
    """What a scheduler goes on from: all else that it decides by is in the log."""

    kind: Literal["schedule"] = "schedule"
    holder: str = ""
    """Who schedules: the scheduler that has the lease, and alone moves this."""
    since: AwareDatetime
    """What has come after this counts for the next run."""
    clock_since: AwareDatetime
    """The same for the moments of cron."""
    due_since: AwareDatetime | None = None
    cause: str = ""
    """What the run is due to."""
    started: int = 0
    """How many runs the schedule has started."""
    run: Id | None = None
    """The last of them."""
    labelled: dict[str, int] = Field(default_factory=dict)
    """How many labelled rows had ever come of each client at *since*: only newer ones count."""
    unlabelled: dict[str, int] = Field(default_factory=dict)
    databases: dict[str, str] = Field(default_factory=dict)
    """What each client had counted them in: in another database it counts from nought."""
    drifted: tuple[str, ...] = ()
    """Which clients were drifted at *since*."""
    accuracy: dict[str, float] = Field(default_factory=dict)
    """How often the model was right that each client served at *since*, of what its users had told."""
    code_version: str = ""
    """What everybody's code was at *since*."""
    rule: ScheduleRule | None = None
    next_at: AwareDatetime | None = None
    """While it watches: when a run may start only because time passes; None where it takes something that happens."""
    awaits: tuple[str, ...] = ()
    """While it watches: the parts of the rule that do not hold yet, and how far they are."""
    fired_at: AwareDatetime | None = None
    """When it last started a run."""
    fired_for: str = ""
    """What that run was due to."""
    traceparent: str = ""
    """Where the trace began that the run is to go on in: when it became due."""

    @property
    def thing(self) -> str:
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
"""What counts as new is counted from these, which each run that the schedule starts or skips sets."""
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
            "the quiet hours, the debounce or the run before to end", "the deadline, where there is one"
        )
    },
    between_runs=frozenset(_S),
)
