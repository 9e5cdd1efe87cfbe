"""The language of eligibility rules, which define the devices that take part in a run.

    labelled >= 64 and (battery > 30 or charging) and hour in 22..6 and model_age > 1h

`RULE_VARIABLES` lists the variables of a rule. Each has a value for devices without such a sensor or part, so
that every rule can be evaluated on every device. Parsing checks all names, units and types;
`fedbus.domain.eligibility` evaluates rules.
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
    """The kind of a variable, which defines its units and comparisons."""

    COUNT = "count"
    PERCENT = "percent"
    CELSIUS = "celsius"
    HOUR = "hour"
    WEEKDAY = "weekday"
    LENGTH = "length of time"
    FLAG = "flag"


@dataclass(frozen=True)
class RuleVariable:
    """A variable of rules."""

    kind: VariableKind
    description: str
    default: float
    """The value on a device that cannot measure it. For a flag, 1 is true."""


INFINITY: Final = float("inf")
RULE_VARIABLES: Final[dict[str, RuleVariable]] = {
    "labelled": RuleVariable(VariableKind.COUNT, "captured rows with a label that training can use", 0),
    "unlabelled": RuleVariable(VariableKind.COUNT, "captured rows without a label", 0),
    "cpu": RuleVariable(VariableKind.PERCENT, "CPU utilization over all cores", 0),
    "memory": RuleVariable(VariableKind.PERCENT, "memory utilization", 0),
    "disk": RuleVariable(VariableKind.PERCENT, "utilization of the disk that fedbus writes to", 0),
    "battery": RuleVariable(VariableKind.PERCENT, "charge of the battery; 100 without a battery", 100),
    "charging": RuleVariable(VariableKind.FLAG, "on external power; true without a battery", 1),
    "idle": RuleVariable(VariableKind.FLAG, "the CPU utilization is below 20 %", 1),
    "gpu": RuleVariable(VariableKind.FLAG, "the device has a GPU", 0),
    "temperature": RuleVariable(
        VariableKind.CELSIUS, "temperature of the hottest sensor; 0 without a sensor", 0
    ),
    "hour": RuleVariable(VariableKind.HOUR, "local time of day, 0 to 24; half past six is 6.5", 0),
    "weekday": RuleVariable(VariableKind.WEEKDAY, "local weekday: mon, tue, wed, thu, fri, sat, sun", 0),
    "model_age": RuleVariable(
        VariableKind.LENGTH, "time since the served model arrived; infinite without a model", INFINITY
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
"""The kinds that wrap around. Only their ranges may have an end below the start."""
COMPARISONS: Final = ("<=", ">=", "==", "!=", "<", ">")


@dataclass(frozen=True)
class Comparison:
    """``labelled >= 64``."""

    name: str
    op: str
    value: float


@dataclass(frozen=True)
class InRange:
    """``hour in 22..6``: from *low* to *high*. *high* is included, except for hours."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class FlagCheck:
    """``charging``."""

    name: str


Predicate: TypeAlias = Comparison | InRange | FlagCheck
Rule: TypeAlias = Expression[Predicate]


def parse_rule(text: str, *, variables: dict[str, RuleVariable] = RULE_VARIABLES) -> Rule:
    """Parse the rule in *text*, which may use only *variables*; raises BadRule."""
    return parse_expression(text, lambda tokens: _parse_predicate(tokens, variables))


def _parse_predicate(tokens: Tokens, variables: dict[str, RuleVariable]) -> Predicate:
    variable = _parse_variable(tokens, variables)
    name, kind = variable.text, variables[variable.text].kind
    if kind is VariableKind.FLAG:
        if tokens.current.text in (*COMPARISONS, "in"):
            tokens.fail(f"{name} is a flag and needs no comparison: write `{name}` or `not {name}`")
        return FlagCheck(name)
    if tokens.accept("in"):
        return _parse_range(tokens, name, kind)
    op = tokens.current
    if not tokens.accept(*COMPARISONS):
        tokens.fail(f"{name} needs a comparison: {' '.join(COMPARISONS)} or `in`")
    return Comparison(name, op.text, _parse_value(tokens, name, kind))


def _parse_variable(tokens: Tokens, variables: dict[str, RuleVariable]) -> Token:
    here = tokens.current
    if here.kind != "name" or here.text in ("and", "or", "in"):
        tokens.fail(f"expected one of {', '.join(variables)}" + (f", not {here.text!r}" if here.text else ""))
    if here.text not in variables:
        near = difflib.get_close_matches(here.text, variables, n=1)
        known = f"did you mean {near[0]}?" if near else f"use one of {', '.join(variables)}"
        tokens.fail(f"unknown variable {here.text!r}: {known}")
    return tokens.advance()


def _parse_range(tokens: Tokens, name: str, kind: VariableKind) -> InRange:
    start = tokens.current.at
    low = _parse_value(tokens, name, kind)
    if not tokens.accept(".."):
        tokens.fail("write a range as from..to, as in `hour in 22..6`")
    high = _parse_value(tokens, name, kind)
    if low > high and kind not in CYCLIC_KINDS:
        tokens.fail("the end of this range is below its start", start)
    if low == high and kind is VariableKind.HOUR:
        tokens.fail("this range is empty: the hour at its end is not included", start)
    return InRange(name, low, high)


def _parse_value(tokens: Tokens, name: str, kind: VariableKind) -> float:
    here = tokens.current
    if kind is VariableKind.WEEKDAY:
        if here.text.lower() not in DAYS:
            tokens.fail(f"{name} must be one of {', '.join(DAYS)}")
        return float(DAYS.index(tokens.advance().text.lower()))
    if here.kind != "number":
        tokens.fail(f"{name} needs a number" + (f", not {here.text!r}" if here.text else ""))
    value = parse_quantity(tokens, UNITS[kind], name)
    if value > MAX_VALUES.get(kind, INFINITY):
        tokens.fail(f"{name} cannot be {value:g} (limit {MAX_VALUES[kind]:g})", here.at)
    return value


def parse_quantity(tokens: Tokens, units: dict[str, float], name: str) -> float:
    """Parse a number with one of *units*; return it in the smallest of them."""
    token = tokens.advance()
    digits = token.text.rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = token.text[len(digits) :]
    if unit not in units:
        known = " or ".join(f"{digits}{one}" for one in units if one != "min")
        tokens.fail(
            f"{name} cannot have the unit {unit!r}: write {known}"
            if unit
            else f"{name} needs a unit: {known}",
            token.at,
        )
    if (value := float(digits) * units[unit]) == INFINITY:
        tokens.fail("this number is too large", token.at)
    return value
