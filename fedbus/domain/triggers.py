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

from fedbus.contracts.expressions.eligibility_rule import rule
from fedbus.contracts.expressions.parser import And, Not, Or, leaves
from fedbus.contracts.expressions.trigger import (
    After,
    Cron,
    Drift,
    Every,
    LiveAccuracy,
    Moved,
    NewCode,
    Rows,
    Source,
    Trigger,
)
from fedbus.contracts.scheduling import CLOCK_WORDS, ScheduleTable
from fedbus.domain.eligibility import clock_facts, holds

MOST_MISSED: Final = 24
"""How many missed moments of cron are made up for, at most."""
LONGEST_DEBOUNCE: Final = 10
"""Times debounce_s: who never stops sending cannot put a run off for ever."""
WEEK_H: Final = 7 * 24 + 2


@dataclass(frozen=True)
class Count:
    """What a client has said of its rows, and when."""

    rows: int
    at: datetime


@dataclass(frozen=True)
class Figure:
    """A metric at the end of the last two runs."""

    before: float
    latest: float
    at: datetime


@dataclass(frozen=True)
class Judged:
    """How often a client's model was right, of what its users have told, and when that was found."""

    accuracy: float
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Seen:
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
    labelled: Mapping[str, Count] = field(default_factory=dict)
    """New rows since *since*, by client."""
    unlabelled: Mapping[str, Count] = field(default_factory=dict)
    drifted: Mapping[str, datetime] = field(default_factory=dict)
    """Which clients are drifted now, and since when."""
    drifted_before: Collection[str] = ()
    """Which were at *since*."""
    judged: Mapping[str, Judged] = field(default_factory=dict)
    """How the model is that each client serves now, where enough is known of it."""
    accuracy_before: Mapping[str, float] = field(default_factory=dict)
    """How the model was that it served at *since*."""
    again: timedelta = timedelta(days=1)
    """What a run did not cure starts no further one by itself before so long has passed."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    new_code_at: datetime | None = None
    finished: Mapping[str, datetime] = field(default_factory=dict)
    """When the last run of each other task finished."""


@dataclass(frozen=True)
class Held:
    """A trigger holds."""

    at: datetime
    """Since when."""
    why: str


def held(trigger: Trigger, seen: Seen) -> Held | None:
    """Since when *trigger* holds, and why; None where it does not."""
    match trigger:
        case Or(parts=parts):
            found = [one for part in parts if (one := held(part, seen)) is not None]
            return min(found, key=lambda one: one.at, default=None)
        case And(parts=parts):
            each = [held(part, seen) for part in parts]
            found = [one for one in each if one is not None]
            if len(found) < len(each):
                return None
            return Held(max(one.at for one in found), ", and ".join(one.why for one in found))
        case Not():
            raise AssertionError("the language of triggers has no not")
        case source:
            return _source_held(source, seen)


def next_look(trigger: Trigger, seen: Seen) -> datetime | None:
    """When *trigger* may come to hold only because time passes; None where it takes an event."""
    sources: list[Source] = leaves(trigger)
    coming = (_next_moment(source, seen) for source in sources)
    return min((one for one in coming if one is not None), default=None)


def awaited(trigger: Trigger, seen: Seen) -> tuple[str, ...]:
    """The parts of *trigger* that do not hold yet, and how far they are."""
    sources: list[Source] = leaves(trigger)
    return tuple(_how_far(source, seen) for source in sources if _source_held(source, seen) is None)


def ready_at(schedule: ScheduleTable, *, due_since: datetime, last_news: datetime | None) -> datetime | None:
    """When a run that is due since *due_since* may start; None where quiet hours never end.

    *last_news*: when a device last said something that triggers read.
    """
    calm = timedelta(seconds=schedule.debounce_s)
    quiet_since = max(due_since, last_news or due_since)
    start = min(quiet_since + calm, due_since + LONGEST_DEBOUNCE * calm)
    return end_of_quiet(schedule, start)


def end_of_quiet(schedule: ScheduleTable, at: datetime) -> datetime | None:
    """*at*, or where that is in the quiet hours, the first moment after them; None where they never end."""
    if schedule.quiet is None:
        return at
    quiet, zone = rule(schedule.quiet, words=CLOCK_WORDS), ZoneInfo(schedule.timezone)
    return next(
        (one for one in _moments_from(at) if not holds(quiet, clock_facts(one.astimezone(zone)))), None
    )


def after_firing(schedule: ScheduleTable, trigger: Trigger, seen: Seen) -> datetime:
    """From when on moments of cron count for the run after this one."""
    if schedule.missed != "all":
        return seen.now
    crons = [source for source in leaves(trigger) if isinstance(source, Cron)]
    moments = (first_moment(cron, seen.clock_since, seen.zone) for cron in crons)
    return min((one for one in moments if one <= seen.now), default=seen.now)


def after_absence(schedule: ScheduleTable, trigger: Trigger, seen: Seen) -> datetime:
    """From when on moments of cron count for a scheduler that comes (back) now."""
    if schedule.missed == "skip":
        return seen.now
    if schedule.missed == "once":
        return seen.clock_since
    crons = [source for source in leaves(trigger) if isinstance(source, Cron)]
    return max((_newest_missed(cron, seen) for cron in crons), default=seen.clock_since)


def first_moment(cron: Cron, after: datetime, zone: ZoneInfo) -> datetime:
    """The first moment of *cron* later than *after*; as Debian's cron where clocks are put forward or back."""
    return next(_cron_moments(cron, after, zone))


# --- each source ----------------------------------------------------------------------------------


def _source_held(source: Source, seen: Seen) -> Held | None:
    at = _since_when(source, seen)
    return Held(at, _in_words(source, seen)) if at is not None and at <= seen.now else None


def _since_when(source: Source, seen: Seen) -> datetime | None:
    """When *source* came to hold, or will by the clock alone; None where it does not."""
    match source:
        case Cron():
            return first_moment(source, seen.clock_since, seen.zone)
        case Every(seconds=seconds):
            return _end_of_interval(seconds, seen)
        case Rows(word=word, least=least, clients=clients):
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            return _nth([one.at for one in counts.values() if one.rows >= least], clients)
        case Drift(clients=clients):
            return _enough_ill(seen.drifted, seen.drifted_before, clients, seen)
        case LiveAccuracy(below=below, clients=clients):
            before = [client for client, accuracy in seen.accuracy_before.items() if accuracy < below]
            return _enough_ill(_poor(below, seen), before, clients, seen)
        case Moved():
            return _moved(source, seen)
        case NewCode():
            return seen.new_code_at
        case After(task=task):
            at = seen.finished.get(task)
            return at if at is not None and at > seen.since else None
        case _:
            assert_never(source)


def _end_of_interval(seconds: float, seen: Seen) -> datetime | None:
    """An interval begins when a run ends; while one is under way nothing is due."""
    if seen.running:
        return None
    if seen.fresh:
        return seen.since
    return max(seen.last_ended or seen.since, seen.since) + timedelta(seconds=seconds)


def _nth(moments: list[datetime], count: int) -> datetime | None:
    """When the *count*-th of them came."""
    return sorted(moments)[count - 1] if len(moments) >= count else None


def _poor(below: float, seen: Seen) -> dict[str, datetime]:
    return {client: one.at for client, one in seen.judged.items() if one.accuracy < below}


def _enough_ill(
    now: Mapping[str, datetime], before: Collection[str], clients: int, seen: Seen
) -> datetime | None:
    """When so many clients were ill and one of them was not at the last run, or that run is long enough ago."""
    reached = _nth(list(now.values()), clients)
    if reached is None:
        return None
    others = [at for client, at in now.items() if client not in before]
    return max(reached, min(others) if others else seen.since + seen.again)


def _moved(source: Moved, seen: Seen) -> datetime | None:
    figure = seen.figures.get(source.metric)
    if figure is None or figure.at <= seen.since:
        return None
    by = (figure.latest - figure.before) * (1 if source.rises else -1)
    limit = abs(figure.before) * source.by / 100 if source.relative else source.by
    return figure.at if by >= limit else None


def _next_moment(source: Source, seen: Seen) -> datetime | None:
    if not isinstance(source, Cron | Every | Drift | LiveAccuracy):
        return None
    at = _since_when(source, seen)
    return at if at is not None and at > seen.now else None


def _in_words(source: Source, seen: Seen) -> str:
    match source:
        case Rows(word=word, least=least):
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            there = [f"{client}: {one.rows}" for client, one in sorted(counts.items()) if one.rows >= least]
            return f"{source} ({_some(there)})"
        case Drift():
            return f"{source} ({_some(sorted(seen.drifted))})"
        case LiveAccuracy(below=below):
            poor = [f"{client}: {seen.judged[client].accuracy:.3g}" for client in sorted(_poor(below, seen))]
            return f"{source} ({_some(poor)})"
        case Moved(metric=metric):
            figure = seen.figures[metric]
            return f"{source} ({figure.before:.4g} → {figure.latest:.4g})"
        case _:
            return str(source)


def _how_far(source: Source, seen: Seen) -> str:
    match source:
        case Rows(word=word, least=least, clients=clients) if clients > 1:
            counts = seen.labelled if word == "labelled" else seen.unlabelled
            return f"{source} ({sum(one.rows >= least for one in counts.values())} so far)"
        case Drift(clients=clients) if clients > 1:
            return f"{source} ({sum(at > seen.since for at in seen.drifted.values())} so far)"
        case Every() if seen.running:
            return f"{source}, once the run under way is over"
        case _:
            return str(source)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- the clock --------------------------------------------------------------------------------------


def _cron_moments(cron: Cron, after: datetime, zone: ZoneInfo) -> Iterator[datetime]:
    for moment in CronSim(cron.text, after.astimezone(zone)):
        if (at := moment.astimezone(UTC)) > after:
            yield at


def _newest_missed(cron: Cron, seen: Seen) -> datetime:
    """From when on the newest `MOST_MISSED` moments of *cron* are still to come."""
    just_after = (seen.now + timedelta(seconds=1)).astimezone(seen.zone)
    back = CronSim(cron.text, just_after, reverse=True)
    earliest = next(islice((one.astimezone(UTC) for one in back), MOST_MISSED, None), seen.clock_since)
    return max(earliest, seen.clock_since)


def _moments_from(at: datetime) -> Iterator[datetime]:
    """*at*, and each quarter of an hour after it, for a week: time zones are that far apart at the least."""
    yield at
    quarter = at.replace(minute=at.minute // 15 * 15, second=0, microsecond=0)
    for number in range(1, 4 * WEEK_H):
        yield quarter + timedelta(minutes=15 * number)
