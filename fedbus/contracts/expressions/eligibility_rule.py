"""The language of a task's eligibility rule: which devices take part, and when.

    labelled >= 64 and (battery > 30 or charging) and hour in 22..6 and model_age > 1h

`WORDS` is all that a rule can speak of, with the unit of each and what it counts as on a device
that has no such thing: so every rule has an answer on every device. A rule is read here, once,
with every name, unit and type checked; `fedbus.domain.eligibility` says whether it holds.
"""

import difflib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from fedbus.contracts.expressions.parser import BadExpression as BadRule
from fedbus.contracts.expressions.parser import Expression, Token, Tokens, parse_expression

__all__ = [
    "RULE_VARIABLES",
    "BadRule",
    "Comparison",
    "FlagCheck",
    "InRange",
    "Predicate",
    "Rule",
    "RuleVariable",
    "VariableKind",
    "parse_rule",
]


class VariableKind(StrEnum):
    """What sort of thing a word is, and so what it can be compared with."""

    COUNT = "count"
    PERCENT = "percent"
    CELSIUS = "celsius"
    HOUR = "hour"
    WEEKDAY = "weekday"
    LENGTH = "length of time"
    FLAG = "flag"


@dataclass(frozen=True)
class RuleVariable:
    """Something that a rule may speak of."""

    kind: VariableKind
    says: str
    absent: float
    """What it counts as where the device has no such thing; of a flag 1 is yes."""


INFINITY: Final = float("inf")
RULE_VARIABLES: Final[dict[str, RuleVariable]] = {
    "labelled": RuleVariable(VariableKind.COUNT, "captured rows with a label that training may use", 0),
    "unlabelled": RuleVariable(VariableKind.COUNT, "captured rows without a label", 0),
    "cpu": RuleVariable(VariableKind.PERCENT, "how busy all cores together are", 0),
    "memory": RuleVariable(VariableKind.PERCENT, "how much of the memory is in use", 0),
    "disk": RuleVariable(VariableKind.PERCENT, "how full the disk is that fedbus writes to", 0),
    "battery": RuleVariable(VariableKind.PERCENT, "its charge; without a battery it counts as full", 100),
    "charging": RuleVariable(VariableKind.FLAG, "on mains; without a battery it counts as charging", 1),
    "idle": RuleVariable(VariableKind.FLAG, "the cores are less than 20 % busy", 1),
    "gpu": RuleVariable(VariableKind.FLAG, "there is a GPU", 0),
    "temperature": RuleVariable(
        VariableKind.CELSIUS, "the hottest sensor; without a sensor it counts as 0", 0
    ),
    "hour": RuleVariable(VariableKind.HOUR, "the local time of day, 0 to 24; half past six is 6.5", 0),
    "weekday": RuleVariable(VariableKind.WEEKDAY, "the local day: mon, tue, wed, thu, fri, sat, sun", 0),
    "model_age": RuleVariable(
        VariableKind.LENGTH, "since the served model came; before there is one, for ever", INFINITY
    ),
}

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
SECONDS_PER_UNIT: Final[dict[str, float]] = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
UNITS: Final[dict[VariableKind, dict[str, float]]] = {
    VariableKind.COUNT: {"": 1},
    VariableKind.PERCENT: {"": 1, "%": 1},
    VariableKind.CELSIUS: {"": 1, "C": 1},
    VariableKind.HOUR: {"": 1, "h": 1},
    VariableKind.LENGTH: SECONDS_PER_UNIT,
}
MAX_VALUES: Final = {VariableKind.PERCENT: 100.0, VariableKind.HOUR: 24.0}
CYCLIC_KINDS: Final = {VariableKind.HOUR, VariableKind.WEEKDAY}
"""After the last comes the first: only these may be in a range that ends before it begins."""
COMPARISONS: Final = ("<=", ">=", "==", "!=", "<", ">")


@dataclass(frozen=True)
class Comparison:
    """``labelled >= 64``."""

    name: str
    op: str
    value: float


@dataclass(frozen=True)
class InRange:
    """``hour in 22..6``: from *low* on and, of hours, before *high*; of anything else *high* is still within."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class FlagCheck:
    """``charging``."""

    name: str


Predicate: TypeAlias = Comparison | InRange | FlagCheck
Rule: TypeAlias = Expression[Predicate]


def parse_rule(text: str, *, words: dict[str, RuleVariable] = RULE_VARIABLES) -> Rule:
    """The rule in *text*; raises BadRule. *words*: all that it may speak of."""
    return parse_expression(text, lambda tokens: _parse_predicate(tokens, words))


def _parse_predicate(tokens: Tokens, words: dict[str, RuleVariable]) -> Predicate:
    word = _parse_variable(tokens, words)
    name, kind = word.text, words[word.text].kind
    if kind is VariableKind.FLAG:
        if tokens.current.text in (*COMPARISONS, "in"):
            tokens.fail(f"{name} is yes or no and is compared with nothing: write `{name}` or `not {name}`")
        return FlagCheck(name)
    if tokens.accept("in"):
        return _parse_range(tokens, name, kind)
    op = tokens.current
    if not tokens.accept(*COMPARISONS):
        tokens.fail(f"{name} needs a comparison: {' '.join(COMPARISONS)} or `in`")
    return Comparison(name, op.text, _parse_value(tokens, name, kind))


def _parse_variable(tokens: Tokens, words: dict[str, RuleVariable]) -> Token:
    here = tokens.current
    if here.kind != "name" or here.text in ("and", "or", "in"):
        tokens.fail(f"expected one of {', '.join(words)}" + (f", not {here.text!r}" if here.text else ""))
    if here.text not in words:
        near = difflib.get_close_matches(here.text, words, n=1)
        known = f"did you mean {near[0]}?" if near else f"a rule can speak of {', '.join(words)}"
        tokens.fail(f"nothing is called {here.text!r}: {known}")
    return tokens.take()


def _parse_range(tokens: Tokens, name: str, kind: VariableKind) -> InRange:
    start = tokens.current.at
    low = _parse_value(tokens, name, kind)
    if not tokens.accept(".."):
        tokens.fail("a range is written from..to, as in `hour in 22..6`")
    high = _parse_value(tokens, name, kind)
    if low > high and kind not in CYCLIC_KINDS:
        tokens.fail("this range ends before it begins", start)
    if low == high and kind is VariableKind.HOUR:
        tokens.fail("this range is empty: the hour it ends with is not in it", start)
    return InRange(name, low, high)


def _parse_value(tokens: Tokens, name: str, kind: VariableKind) -> float:
    here = tokens.current
    if kind is VariableKind.WEEKDAY:
        if here.text.lower() not in DAYS:
            tokens.fail(f"{name} is one of {', '.join(DAYS)}")
        return float(DAYS.index(tokens.take().text.lower()))
    if here.kind != "number":
        tokens.fail(f"{name} is compared with a number" + (f", not with {here.text!r}" if here.text else ""))
    value = parse_quantity(tokens, UNITS[kind], name)
    if value > MAX_VALUES.get(kind, INFINITY):
        tokens.fail(f"{name} is at most {MAX_VALUES[kind]:g}", here.at)
    return value


def parse_quantity(tokens: Tokens, units: dict[str, float], name: str) -> float:
    """A number with one of these *units*, in the smallest of them."""
    token = tokens.take()
    digits = token.text.rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = token.text[len(digits) :]
    if unit not in units:
        known = " or ".join(f"{digits}{one}" for one in units if one != "min")
        tokens.fail(
            f"{name} has no unit {unit!r}: write {known}" if unit else f"{name} needs a unit: {known}",
            token.at,
        )
    if (value := float(digits) * units[unit]) == INFINITY:
        tokens.fail("this number is too large", token.at)
    return value
