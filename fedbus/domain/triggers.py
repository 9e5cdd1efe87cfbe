"""Scheduling of runs as pure functions: triggers, debounce and quiet hours.

    evaluate_trigger(trigger, inputs)    since when the trigger holds, and why; None if it does not
    next_evaluation(trigger, inputs)     when it may start to hold through time alone
    unmet_conditions(trigger, inputs)    the conditions that do not hold yet
    ready_at(schedule, …)                when a due run may start: after the debounce, outside quiet hours
    cron_start_after_run(schedule, …)    the time after which cron times count for the run after this one

Laws: ``A or B`` holds since the first of its parts, ``A and B`` since the last of them. A condition that holds
continues to hold until a run starts (`TriggerInputs.since` moves); drift and low live accuracy are exceptions,
which also end when the devices recover. `next_evaluation` is never in the past.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final, assert_never
from zoneinfo import ZoneInfo

from cronsim import CronSim

from fedbus.contracts.expressions.eligibility_rule import parse_rule
from fedbus.contracts.expressions.parser import And, Not, Or, leaves
from fedbus.contracts.expressions.trigger import (
    CronCondition,
    DriftCondition,
    IntervalCondition,
    LiveAccuracyCondition,
    MetricChangeCondition,
    NewCodeCondition,
    RowCountCondition,
    TaskFinishedCondition,
    Trigger,
    TriggerCondition,
)
from fedbus.contracts.scheduling import CLOCK_VARIABLES, ScheduleTable
from fedbus.domain.eligibility import clock_inputs, is_satisfied

MAX_MISSED: Final = 24
"""Missed cron times that are caught up, at most."""
MAX_DEBOUNCE_FACTOR: Final = 10
"""The longest debounce, in multiples of debounce_s: a device that sends all the time cannot postpone a run for ever."""
WEEK_H: Final = 7 * 24 + 2


@dataclass(frozen=True)
class ClientRowCount:
    """The row count that a client reported, and when."""

    rows: int
    at: datetime


@dataclass(frozen=True)
class RunMetric:
    """The values of a metric at the end of the last two runs."""

    before: float
    latest: float
    at: datetime


@dataclass(frozen=True)
class ClientAccuracy:
    """The share of a client's labelled predictions that were correct, and when it was measured."""

    accuracy: float
    at: datetime


@dataclass(frozen=True, kw_only=True)
class TriggerInputs:
    """All inputs of a trigger's evaluation."""

    now: datetime
    since: datetime
    """Only events after this count; for cron, only times after *clock_since*."""
    clock_since: datetime
    zone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    is_first_run: bool = False
    """True if no run of the task has ended, and the schedule has started none."""
    is_running: bool = False
    last_ended: datetime | None = None
    labelled: Mapping[str, ClientRowCount] = field(default_factory=dict)
    """New rows after *since*, by client."""
    unlabelled: Mapping[str, ClientRowCount] = field(default_factory=dict)
    drifted: Mapping[str, datetime] = field(default_factory=dict)
    """The clients that drift now, and since when."""
    drifted_before: Collection[str] = ()
    """The clients that drifted at *since*."""
    accuracy: Mapping[str, ClientAccuracy] = field(default_factory=dict)
    """The live accuracy of the model that each client serves now, if enough labels are known."""
    accuracy_before: Mapping[str, float] = field(default_factory=dict)
    """The live accuracy of the model that each client served at *since*."""
    repeat_after: timedelta = timedelta(days=1)
    """Drift or low accuracy that a run did not improve starts another run only after this time."""
    metrics: Mapping[str, RunMetric] = field(default_factory=dict)
    new_code_at: datetime | None = None
    finished: Mapping[str, datetime] = field(default_factory=dict)
    """When the last run of each other task finished, by task."""


@dataclass(frozen=True)
class TriggerFired:
    """The time since which a trigger holds, and why."""

    at: datetime
    reason: str


def evaluate_trigger(trigger: Trigger, inputs: TriggerInputs) -> TriggerFired | None:
    """Return since when *trigger* holds, and why; None if it does not hold."""
    match trigger:
        case Or(parts=parts):
            found = [one for part in parts if (one := evaluate_trigger(part, inputs)) is not None]
            return min(found, key=lambda one: one.at, default=None)
        case And(parts=parts):
            each = [evaluate_trigger(part, inputs) for part in parts]
            found = [one for one in each if one is not None]
            if len(found) < len(each):
                return None
            return TriggerFired(max(one.at for one in found), ", and ".join(one.reason for one in found))
        case Not():
            raise AssertionError("Trigger expressions have no `not`.")
        case condition:
            return _evaluate_condition(condition, inputs)


def next_evaluation(trigger: Trigger, inputs: TriggerInputs) -> datetime | None:
    """Return when *trigger* may start to hold because time passes; None if it needs an event."""
    conditions: list[TriggerCondition] = leaves(trigger)
    times = (_next_condition_time(condition, inputs) for condition in conditions)
    return min((one for one in times if one is not None), default=None)


def unmet_conditions(trigger: Trigger, inputs: TriggerInputs) -> tuple[str, ...]:
    """Describe the conditions of *trigger* that do not hold yet, with their progress."""
    conditions: list[TriggerCondition] = leaves(trigger)
    return tuple(
        _describe_progress(condition, inputs)
        for condition in conditions
        if _evaluate_condition(condition, inputs) is None
    )


def ready_at(schedule: ScheduleTable, *, due_since: datetime, last_input: datetime | None) -> datetime | None:
    """Return when a run that is due since *due_since* may start; None if the quiet hours never end.

    *last_input* is when a device last sent a message that triggers read.
    """
    debounce = timedelta(seconds=schedule.debounce_s)
    quiet_since = max(due_since, last_input or due_since)
    start = min(quiet_since + debounce, due_since + MAX_DEBOUNCE_FACTOR * debounce)
    return quiet_hours_end(schedule, start)


def quiet_hours_end(schedule: ScheduleTable, at: datetime) -> datetime | None:
    """Return *at*, or the end of the quiet hours if *at* is in them; None if they never end."""
    if schedule.quiet is None:
        return at
    quiet, zone = parse_rule(schedule.quiet, variables=CLOCK_VARIABLES), ZoneInfo(schedule.timezone)
    return next(
        (
            one
            for one in _quarter_hours_from(at)
            if not is_satisfied(quiet, clock_inputs(one.astimezone(zone)))
        ),
        None,
    )


def cron_start_after_run(schedule: ScheduleTable, trigger: Trigger, inputs: TriggerInputs) -> datetime:
    """Return the time after which cron times count for the run after this one."""
    if schedule.missed != "all":
        return inputs.now
    crons = [condition for condition in leaves(trigger) if isinstance(condition, CronCondition)]
    moments = (first_cron_time(cron, inputs.clock_since, inputs.zone) for cron in crons)
    return min((one for one in moments if one <= inputs.now), default=inputs.now)


def cron_start_after_restart(schedule: ScheduleTable, trigger: Trigger, inputs: TriggerInputs) -> datetime:
    """Return the time after which cron times count for a scheduler that starts now."""
    if schedule.missed == "skip":
        return inputs.now
    if schedule.missed == "once":
        return inputs.clock_since
    crons = [condition for condition in leaves(trigger) if isinstance(condition, CronCondition)]
    return max((_oldest_counted_miss(cron, inputs) for cron in crons), default=inputs.clock_since)


def first_cron_time(cron: CronCondition, after: datetime, zone: ZoneInfo) -> datetime:
    """Return the first time of *cron* after *after*; daylight-saving changes are handled as in Debian's cron."""
    return next(_cron_times(cron, after, zone))


# --- conditions -----------------------------------------------------------------------------------


def _evaluate_condition(condition: TriggerCondition, inputs: TriggerInputs) -> TriggerFired | None:
    at = _condition_time(condition, inputs)
    return (
        TriggerFired(at, _describe_fired(condition, inputs)) if at is not None and at <= inputs.now else None
    )


def _condition_time(condition: TriggerCondition, inputs: TriggerInputs) -> datetime | None:
    """Return when *condition* started to hold, or will through time alone; None otherwise."""
    match condition:
        case CronCondition():
            return first_cron_time(condition, inputs.clock_since, inputs.zone)
        case IntervalCondition(seconds=seconds):
            return _end_of_interval(seconds, inputs)
        case RowCountCondition(kind=kind, min_rows=min_rows, clients=clients):
            counts = inputs.labelled if kind == "labelled" else inputs.unlabelled
            return _nth([one.at for one in counts.values() if one.rows >= min_rows], clients)
        case DriftCondition(clients=clients):
            return _enough_drifted(inputs.drifted, inputs.drifted_before, clients, inputs)
        case LiveAccuracyCondition(below=below, clients=clients):
            before = [client for client, accuracy in inputs.accuracy_before.items() if accuracy < below]
            return _enough_drifted(_inaccurate_clients(below, inputs), before, clients, inputs)
        case MetricChangeCondition():
            return _metric_change_time(condition, inputs)
        case NewCodeCondition():
            return inputs.new_code_at
        case TaskFinishedCondition(task=task):
            at = inputs.finished.get(task)
            return at if at is not None and at > inputs.since else None
        case _:
            assert_never(condition)


def _end_of_interval(seconds: float, inputs: TriggerInputs) -> datetime | None:
    """Return the end of the interval that began when the last run ended; None during a run."""
    if inputs.is_running:
        return None
    if inputs.is_first_run:
        return inputs.since
    return max(inputs.last_ended or inputs.since, inputs.since) + timedelta(seconds=seconds)


def _nth(moments: list[datetime], count: int) -> datetime | None:
    """Return the *count*-th earliest of *moments*; None if there are fewer."""
    return sorted(moments)[count - 1] if len(moments) >= count else None


def _inaccurate_clients(below: float, inputs: TriggerInputs) -> dict[str, datetime]:
    return {client: one.at for client, one in inputs.accuracy.items() if one.accuracy < below}


def _enough_drifted(
    now: Mapping[str, datetime], before: Collection[str], clients: int, inputs: TriggerInputs
) -> datetime | None:
    """Return when at least *clients* clients were affected; None if fewer are.

    If all of them were affected before the last run already, that run did not help: wait for `again`.
    """
    reached = _nth(list(now.values()), clients)
    if reached is None:
        return None
    newly_affected = [at for client, at in now.items() if client not in before]
    return max(reached, min(newly_affected) if newly_affected else inputs.since + inputs.repeat_after)


def _metric_change_time(condition: MetricChangeCondition, inputs: TriggerInputs) -> datetime | None:
    metric = inputs.metrics.get(condition.metric)
    if metric is None or metric.at <= inputs.since:
        return None
    change = (metric.latest - metric.before) * (1 if condition.rises else -1)
    limit = abs(metric.before) * condition.by / 100 if condition.relative else condition.by
    return metric.at if change >= limit else None


def _next_condition_time(condition: TriggerCondition, inputs: TriggerInputs) -> datetime | None:
    if not isinstance(condition, CronCondition | IntervalCondition | DriftCondition | LiveAccuracyCondition):
        return None
    at = _condition_time(condition, inputs)
    return at if at is not None and at > inputs.now else None


def _describe_fired(condition: TriggerCondition, inputs: TriggerInputs) -> str:
    match condition:
        case RowCountCondition(kind=kind, min_rows=min_rows):
            counts = inputs.labelled if kind == "labelled" else inputs.unlabelled
            reached = [
                f"{client}: {one.rows}" for client, one in sorted(counts.items()) if one.rows >= min_rows
            ]
            return f"{condition} ({_format_names(reached)})"
        case DriftCondition():
            return f"{condition} ({_format_names(sorted(inputs.drifted))})"
        case LiveAccuracyCondition(below=below):
            inaccurate = [
                f"{client}: {inputs.accuracy[client].accuracy:.3g}"
                for client in sorted(_inaccurate_clients(below, inputs))
            ]
            return f"{condition} ({_format_names(inaccurate)})"
        case MetricChangeCondition(metric=metric):
            values = inputs.metrics[metric]
            return f"{condition} ({values.before:.4g} → {values.latest:.4g})"
        case _:
            return str(condition)


def _describe_progress(condition: TriggerCondition, inputs: TriggerInputs) -> str:
    match condition:
        case RowCountCondition(kind=kind, min_rows=min_rows, clients=clients) if clients > 1:
            counts = inputs.labelled if kind == "labelled" else inputs.unlabelled
            return f"{condition} ({sum(one.rows >= min_rows for one in counts.values())} so far)"
        case DriftCondition(clients=clients) if clients > 1:
            return f"{condition} ({sum(at > inputs.since for at in inputs.drifted.values())} so far)"
        case IntervalCondition() if inputs.is_running:
            return f"{condition}, after the current run ends"
        case _:
            return str(condition)


def _format_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- cron and quiet hours ---------------------------------------------------------------------------


def _cron_times(cron: CronCondition, after: datetime, zone: ZoneInfo) -> Iterator[datetime]:
    for moment in CronSim(cron.text, after.astimezone(zone)):
        if (at := moment.astimezone(UTC)) > after:
            yield at


def _oldest_counted_miss(cron: CronCondition, inputs: TriggerInputs) -> datetime:
    """Return the time after which the newest `MAX_MISSED` missed times of *cron* lie."""
    just_after = (inputs.now + timedelta(seconds=1)).astimezone(inputs.zone)
    back = CronSim(cron.text, just_after, reverse=True)
    earliest = next(islice((one.astimezone(UTC) for one in back), MAX_MISSED, None), inputs.clock_since)
    return max(earliest, inputs.clock_since)


def _quarter_hours_from(at: datetime) -> Iterator[datetime]:
    """Yield *at* and each quarter of an hour after it, for a week: UTC offsets are multiples of 15 minutes."""
    yield at
    quarter = at.replace(minute=at.minute // 15 * 15, second=0, microsecond=0)
    for number in range(1, 4 * WEEK_H):
        yield quarter + timedelta(minutes=15 * number)
