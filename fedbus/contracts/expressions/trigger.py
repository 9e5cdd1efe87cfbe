"""The language of triggers, which define when runs start automatically.

    cron '0 3 * * *' or (labelled >= 64 on 3 clients and every 6h) or drift on 2 clients

A condition is an event (`cron`, `every`, `new_code`, `after`, …), a count since the last run (`labelled`), or
the current state of devices (`drift`, `live_accuracy`). An event stays true until the next run starts:
``A and B`` means that both have occurred since the last run, in any order, and ``A or B`` that one has.
`fedbus.domain.triggers` evaluates triggers.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias

from cronsim import CronSim, CronSimError

from fedbus.contracts.expressions.eligibility_rule import SECONDS_PER_UNIT, parse_quantity
from fedbus.contracts.expressions.parser import BadExpression as BadTrigger
from fedbus.contracts.expressions.parser import Expression, Token, Tokens, parse_expression
from fedbus.contracts.identifiers import BadId, task_id

__all__ = [
    "BadTrigger",
    "CronCondition",
    "DriftCondition",
    "IntervalCondition",
    "LiveAccuracyCondition",
    "MetricChangeCondition",
    "NewCodeCondition",
    "RowCountCondition",
    "TaskFinishedCondition",
    "Trigger",
    "TriggerCondition",
    "parse_trigger",
]

SYNTAX_HELP: Final = (
    "write cron '0 3 * * *', every 6h, labelled >= 64 on 3 clients, unlabelled >= 1000 on 1 client, "
    "drift on 2 clients, live_accuracy < 0.8 on 2 clients, accuracy drops 0.05, loss rises 10%, "
    "new_code or after other-task"
)


@dataclass(frozen=True)
class CronCondition:
    """``cron '0 3 * * *'``, in the schedule's time zone."""

    text: str

    def __str__(self) -> str:
        return f"cron '{self.text}'"


@dataclass(frozen=True)
class IntervalCondition:
    """``every 6h``: this time after the end of the last run, whatever started it. The first run starts at once."""

    seconds: float

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


@dataclass(frozen=True)
class RowCountCondition:
    """``labelled >= 64 on 3 clients``: at least 64 new rows since the last scheduled run, on each of 3 clients."""

    kind: str
    min_rows: int
    clients: int

    def __str__(self) -> str:
        return f"{self.kind} >= {self.min_rows} on {_format_clients(self.clients)}"


@dataclass(frozen=True)
class DriftCondition:
    """``drift on 2 clients``: 2 clients have drift now, and not all of them had it at the last scheduled run."""

    clients: int

    def __str__(self) -> str:
        return f"drift on {_format_clients(self.clients)}"


@dataclass(frozen=True)
class LiveAccuracyCondition:
    """``live_accuracy < 0.8 on 2 clients``: the live accuracy of the model on 2 clients is below 0.8 now."""

    below: float
    clients: int

    def __str__(self) -> str:
        return f"live_accuracy < {self.below:g} on {_format_clients(self.clients)}"


@dataclass(frozen=True)
class MetricChangeCondition:
    """``accuracy drops 0.05``, ``loss rises 10%``: the change of the final metric from one run to the next."""

    metric: str
    rises: bool
    by: float
    relative: bool

    def __str__(self) -> str:
        by = f"{self.by:g}%" if self.relative else f"{self.by:g}"
        return f"{self.metric} {'rises' if self.rises else 'drops'} {by}"


@dataclass(frozen=True)
class NewCodeCondition:
    """``new_code``: the deployed code version differs from that of the last run."""

    def __str__(self) -> str:
        return "new_code"


@dataclass(frozen=True)
class TaskFinishedCondition:
    """``after other-task``: a run of another task has finished."""

    task: str

    def __str__(self) -> str:
        return f"after {self.task}"


TriggerCondition: TypeAlias = (
    CronCondition
    | IntervalCondition
    | RowCountCondition
    | DriftCondition
    | LiveAccuracyCondition
    | MetricChangeCondition
    | NewCodeCondition
    | TaskFinishedCondition
)
Trigger: TypeAlias = Expression[TriggerCondition]


def parse_trigger(text: str) -> Trigger:
    """Parse the trigger in *text*; raises BadTrigger."""
    return parse_expression(
        text, _parse_condition, no_not_reason="a trigger cannot contain `not`: its conditions are events"
    )


def _parse_condition(tokens: Tokens) -> TriggerCondition:
    here = tokens.current
    if here.kind != "name" or here.text in ("and", "or"):
        tokens.fail(SYNTAX_HELP)
    tokens.advance()
    match here.text:
        case "cron":
            return _parse_cron(tokens)
        case "every":
            return IntervalCondition(_parse_amount(tokens, "every", SECONDS_PER_UNIT))
        case "labelled" | "unlabelled":
            if not tokens.accept(">="):
                tokens.fail(f"write {here.text} >= 64 on 3 clients")
            return RowCountCondition(here.text, _parse_count(tokens, here.text), _parse_client_count(tokens))
        case "drift":
            return DriftCondition(_parse_client_count(tokens))
        case "live_accuracy":
            return _parse_live_accuracy(tokens)
        case "new_code":
            return NewCodeCondition()
        case "after":
            return _parse_task_finished(tokens)
        case _:
            return _parse_metric_change(tokens, here)


def _parse_live_accuracy(tokens: Tokens) -> LiveAccuracyCondition:
    if not tokens.accept("<"):
        tokens.fail("write live_accuracy < 0.8 on 2 clients")
    at, below = tokens.current.at, _parse_amount(tokens, "live_accuracy", {"": 1.0, "%": 0.01})
    if below > 1:
        tokens.fail("an accuracy is at most 1: write live_accuracy < 0.8, or < 80%", at)
    return LiveAccuracyCondition(below, _parse_client_count(tokens))


def _parse_metric_change(tokens: Tokens, metric: Token) -> MetricChangeCondition:
    rises = tokens.current.text == "rises"
    if not tokens.accept("drops", "rises"):
        tokens.fail(f"unknown condition {metric.text!r}: {SYNTAX_HELP}", metric.at)
    relative = tokens.current.text.endswith("%")
    return MetricChangeCondition(
        metric.text, rises, _parse_amount(tokens, metric.text, {"": 1.0, "%": 1.0}), relative
    )


def _parse_cron(tokens: Tokens) -> CronCondition:
    here = tokens.current
    if here.kind != "text":
        tokens.fail("cron needs five fields in quotes, as in cron '0 3 * * *'")
    text = " ".join(tokens.advance().text[1:-1].split())
    if (what := cron_error(text)) is not None:
        tokens.fail(
            f"{text!r} is not a valid cron expression ({what}): write minute hour day month weekday", here.at
        )
    return CronCondition(text)


def cron_error(text: str) -> str | None:
    """Describe the problem of a cron expression; None if it is valid."""
    if len(text.split()) != 5:
        return "it needs five fields"
    try:
        next(CronSim(text, datetime.now(UTC)))
    except CronSimError as error:
        return str(error).lower()
    except StopIteration:
        return "no date matches it"
    return None


def _parse_task_finished(tokens: Tokens) -> TaskFinishedCondition:
    here = tokens.current
    try:
        return TaskFinishedCondition(task_id(tokens.advance().text.strip("'\"")))
    except BadId:
        tokens.fail("after needs the id of a task", here.at)


def _parse_client_count(tokens: Tokens) -> int:
    if not tokens.accept("on"):
        return 1
    count = _parse_count(tokens, "on")
    if not tokens.accept("client", "clients"):
        tokens.fail("write `clients` after the number, as in on 3 clients")
    return count


def _parse_count(tokens: Tokens, name: str) -> int:
    at, value = tokens.current.at, _parse_amount(tokens, name, {"": 1.0})
    if value != int(value):
        tokens.fail("this must be a whole number", at)
    return int(value)


def _parse_amount(tokens: Tokens, name: str, units: dict[str, float]) -> float:
    at = tokens.current.at
    if tokens.current.kind != "number":
        tokens.fail(f"{name} needs a number")
    value = parse_quantity(tokens, units, name)
    if value <= 0:
        tokens.fail("this must be greater than 0", at)
    return value


def _format_clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"
