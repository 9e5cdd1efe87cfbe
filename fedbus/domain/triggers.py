"""Whether the next run is due: a schedule's trigger, the quiet hours and the rest, as plain functions.

    held(trigger, seen)          since when it holds, and why; None where it does not
    next_look(trigger, seen)     when it may hold by itself, if nothing comes before
    awaited(trigger, seen)       what it still waits for
    ready_at(schedule, …)        when a run that is due may start: after the debounce, not in quiet hours
    after_firing(schedule, …)    from when on moments of cron count for the run after

Laws: ``A or B`` holds since the first of its parts, ``A and B`` since the last of them; what holds
goes on holding until a run has started (`Seen.since` moves), but for drift and a poor live accuracy, which end when
the devices are well; `next_look` is never in the past.
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
"""How many missed moments of cron are made up for, at most."""
MAX_DEBOUNCE_FACTOR: Final = 10
"""Times debounce_s: who never stops sending cannot put a run off for ever."""
WEEK_H: Final = 7 * 24 + 2


@dataclass(frozen=True)
class ClientRowCount:
    """What a client has said of its rows, and when."""

    rows: int
    at: datetime


@dataclass(frozen=True)
class RunMetric:
    """A metric at the end of the last two runs."""

    before: float
    latest: float
    at: datetime


@dataclass(frozen=True)
class ClientAccuracy:
    """How often a client's model was right, of what its users have told, and when that was found."""

    accuracy: float
    at: datetime


@dataclass(frozen=True, kw_only=True)
class TriggerInputs:
    """All that a trigger is decided by."""

    now: datetime
    since: datetime
    """Only what came after this counts; of cron, after *clock_since*."""
    clock_since: datetime
    zone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    fresh: bool = False
    """Whether no run of the task has ever ended, or been started by the schedule."""
    running: bool = False
    last_ended: datetime | None = None
    labelled: Mapping[str, ClientRowCount] = field(default_factory=dict)
    """New rows since *since*, by client."""
    unlabelled: Mapping[str, ClientRowCount] = field(default_factory=dict)
    drifted: Mapping[str, datetime] = field(default_factory=dict)
    """Which clients are drifted now, and since when."""
    drifted_before: Collection[str] = ()
    """Which were at *since*."""
    judged: Mapping[str, ClientAccuracy] = field(default_factory=dict)
    """How the model is that each client serves now, where enough is known of it."""
    accuracy_before: Mapping[str, float] = field(default_factory=dict)
    """How the model was that it served at *since*."""
    again: timedelta = timedelta(days=1)
    """What a run did not cure starts no further one by itself before so long has passed."""
    figures: Mapping[str, RunMetric] = field(default_factory=dict)
    new_code_at: datetime | None = None
    finished: Mapping[str, datetime] = field(default_factory=dict)
    """When the last run of each other task finished."""


@dataclass(frozen=True)
class TriggerFired:
    """A trigger holds."""

    at: datetime
    """Since when."""
    why: str


def evaluate_trigger(trigger: Trigger, seen: TriggerInputs) -> TriggerFired | None:
    """Since when *trigger* holds, and why; None where it does not."""
    match trigger:
        case Or(parts=parts):
            found = [one for part in parts if (one := evaluate_trigger(part, seen)) is not None]
            return min(found, key=lambda one: one.at, default=None)
        case And(parts=parts):
            each = [evaluate_trigger(part, seen) for part in parts]
            found = [one for one in each if one is not None]
            if len(found) < len(each):
                return None
            return TriggerFired(max(one.at for one in found), ", and ".join(one.why for one in found))
        case Not():
            raise AssertionError("the language of triggers has no not")
        case source:
            return _evaluate_condition(source, seen)


def next_evaluation(trigger: Trigger, seen: TriggerInputs) -> datetime | None:
    """When *trigger* may come to hold only because time passes; None where it takes an event."""
    sources: list[TriggerCondition] = leaves(trigger)
    coming = (_next_condition_time(source, seen) for source in sources)
    return min((one for one in coming if one is not None), default=None)


def unmet_conditions(trigger: Trigger, seen: TriggerInputs) -> tuple[str, ...]:
    """The parts of *trigger* that do not hold yet, and how far they are."""
    sources: list[TriggerCondition] = leaves(trigger)
    return tuple(
        _describe_progress(source, seen) for source in sources if _evaluate_condition(source, seen) is None
    )


def ready_at(schedule: ScheduleTable, *, due_since: datetime, last_news: datetime | None) -> datetime | None:
    """When a run that is due since *due_since* may start; None where quiet hours never end.

    *last_news*: when a device last said something that triggers read.
    """
    calm = timedelta(seconds=schedule.debounce_s)
    quiet_since = max(due_since, last_news or due_since)
    start = min(quiet_since + calm, due_since + MAX_DEBOUNCE_FACTOR * calm)
    return quiet_hours_end(schedule, start)


def quiet_hours_end(schedule: ScheduleTable, at: datetime) -> datetime | None:
    """*at*, or where that is in the quiet hours, the first moment after them; None where they never end."""
    if schedule.quiet is None:
        return at
    quiet, zone = parse_rule(schedule.quiet, words=CLOCK_VARIABLES), ZoneInfo(schedule.timezone)
    return next(
        (
            one
            for one in _quarter_hours_from(at)
            if not is_satisfied(quiet, clock_inputs(one.astimezone(zone)))
        ),
        None,
    )


def cron_start_after_run(schedule: ScheduleTable, trigger: Trigger, seen: TriggerInputs) -> datetime:
    """From when on moments of cron count for the run after this one."""
    if schedule.missed != "all":
        return seen.now
    crons = [source for source in leaves(trigger) if isinstance(source, CronCondition)]
    moments = (first_cron_time(cron, seen.clock_since, seen.zone) for cron in crons)
    return min((one for one in moments if one <= seen.now), default=seen.now)


def cron_start_after_restart(schedule: ScheduleTable, trigger: Trigger, seen: TriggerInputs) -> datetime:
    """From when on moments of cron count for a scheduler that comes (back) now."""
    if schedule.missed == "skip":
        return seen.now
    if schedule.missed == "once":
        return seen.clock_since
    crons = [source for source in leaves(trigger) if isinstance(source, CronCondition)]
    return max((_oldest_counted_miss(cron, seen) for cron in crons), default=seen.clock_since)


def first_cron_time(cron: CronCondition, after: datetime, zone: ZoneInfo) -> datetime:
    """The first moment of *cron* later than *after*; as Debian's cron where clocks are put forward or back."""
    return next(_cron_times(cron, after, zone))


# --- each source ----------------------------------------------------------------------------------


def _evaluate_condition(source: TriggerCondition, seen: TriggerInputs) -> TriggerFired | None:
    at = _condition_time(source, seen)
    return TriggerFired(at, _describe_fired(source, seen)) if at is not None and at <= seen.now else None


def _condition_time(source: TriggerCondition, seen: TriggerInputs) -> datetime | None:
    """When *source* came to hold, or will by the clock alone; None where it does not."""
    match source:
        case CronCondition():
            return first_cron_time(source, seen.clock_since, seen.zone)
        case IntervalCondition(seconds=seconds):
            return _end_of_interval(seconds, seen)
        case RowCountCondition(word=word, least=least, clients=clients):
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            return _nth([one.at for one in counts.values() if one.rows >= least], clients)
        case DriftCondition(clients=clients):
            return _enough_drifted(seen.drifted, seen.drifted_before, clients, seen)
        case LiveAccuracyCondition(below=below, clients=clients):
            before = [client for client, accuracy in seen.accuracy_before.items() if accuracy < below]
            return _enough_drifted(_inaccurate_clients(below, seen), before, clients, seen)
        case MetricChangeCondition():
            return _metric_change_time(source, seen)
        case NewCodeCondition():
            return seen.new_code_at
        case TaskFinishedCondition(task=task):
            at = seen.finished.get(task)
            return at if at is not None and at > seen.since else None
        case _:
            assert_never(source)


def _end_of_interval(seconds: float, seen: TriggerInputs) -> datetime | None:
    """An interval begins when a run ends; while one is under way nothing is due."""
    if seen.running:
        return None
    if seen.fresh:
        return seen.since
    return max(seen.last_ended or seen.since, seen.since) + timedelta(seconds=seconds)


def _nth(moments: list[datetime], count: int) -> datetime | None:
    """When the *count*-th of them came."""
    return sorted(moments)[count - 1] if len(moments) >= count else None


def _inaccurate_clients(below: float, seen: TriggerInputs) -> dict[str, datetime]:
    return {client: one.at for client, one in seen.judged.items() if one.accuracy < below}


def _enough_drifted(
    now: Mapping[str, datetime], before: Collection[str], clients: int, seen: TriggerInputs
) -> datetime | None:
    """When so many clients were ill and one of them was not at the last run, or that run is long enough ago."""
    reached = _nth(list(now.values()), clients)
    if reached is None:
        return None
    others = [at for client, at in now.items() if client not in before]
    return max(reached, min(others) if others else seen.since + seen.again)


def _metric_change_time(source: MetricChangeCondition, seen: TriggerInputs) -> datetime | None:
    figure = seen.figures.get(source.metric)
    if figure is None or figure.at <= seen.since:
        return None
    by = (figure.latest - figure.before) * (1 if source.rises else -1)
    limit = abs(figure.before) * source.by / 100 if source.relative else source.by
    return figure.at if by >= limit else None


def _next_condition_time(source: TriggerCondition, seen: TriggerInputs) -> datetime | None:
    if not isinstance(source, CronCondition | IntervalCondition | DriftCondition | LiveAccuracyCondition):
        return None
    at = _condition_time(source, seen)
    return at if at is not None and at > seen.now else None


def _describe_fired(source: TriggerCondition, seen: TriggerInputs) -> str:
    match source:
        case RowCountCondition(word=word, least=least):
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            there = [f"{client}: {one.rows}" for client, one in sorted(counts.items()) if one.rows >= least]
            return f"{source} ({_format_names(there)})"
        case DriftCondition():
            return f"{source} ({_format_names(sorted(seen.drifted))})"
        case LiveAccuracyCondition(below=below):
            poor = [
                f"{client}: {seen.judged[client].accuracy:.3g}"
                for client in sorted(_inaccurate_clients(below, seen))
            ]
            return f"{source} ({_format_names(poor)})"
        case MetricChangeCondition(metric=metric):
            figure = seen.figures[metric]
            return f"{source} ({figure.before:.4g} → {figure.latest:.4g})"
        case _:
            return str(source)


def _describe_progress(source: TriggerCondition, seen: TriggerInputs) -> str:
    match source:
        case RowCountCondition(word=word, least=least, clients=clients) if clients > 1:
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            return f"{source} ({sum(one.rows >= least for one in counts.values())} so far)"
        case DriftCondition(clients=clients) if clients > 1:
            return f"{source} ({sum(at > seen.since for at in seen.drifted.values())} so far)"
        case IntervalCondition() if seen.running:
            return f"{source}, once the run under way is over"
        case _:
            return str(source)


def _format_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- the clock --------------------------------------------------------------------------------------


def _cron_times(cron: CronCondition, after: datetime, zone: ZoneInfo) -> Iterator[datetime]:
    for moment in CronSim(cron.text, after.astimezone(zone)):
        if (at := moment.astimezone(UTC)) > after:
            yield at


def _oldest_counted_miss(cron: CronCondition, seen: TriggerInputs) -> datetime:
    """From when on the newest `MOST_MISSED` moments of *cron* are still to come."""
    just_after = (seen.now + timedelta(seconds=1)).astimezone(seen.zone)
    back = CronSim(cron.text, just_after, reverse=True)
    earliest = next(islice((one.astimezone(UTC) for one in back), MAX_MISSED, None), seen.clock_since)
    return max(earliest, seen.clock_since)


def _quarter_hours_from(at: datetime) -> Iterator[datetime]:
    """*at*, and each quarter of an hour after it, for a week: time zones are that far apart at the least."""
    yield at
    quarter = at.replace(minute=at.minute // 15 * 15, second=0, microsecond=0)
    for number in range(1, 4 * WEEK_H):
        yield quarter + timedelta(minutes=15 * number)
