"""Evaluation of a task's eligibility rule on a device, with the failing part and its values as the reason.

Law: `unmet_reason` returns a reason if and only if `is_satisfied` is false. A variable that a device does not
have counts as its `absent` value in `RULE_VARIABLES`, so that every rule can be evaluated on every device.
"""

import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final, TypeAlias, assert_never

from fedbus.contracts.expressions.eligibility_rule import (
    CYCLIC_KINDS,
    DAYS,
    RULE_VARIABLES,
    Comparison,
    FlagCheck,
    InRange,
    Predicate,
    Rule,
    VariableKind,
)
from fedbus.contracts.expressions.parser import And, Not, Or

IDLE_BELOW: Final = 20.0
"""CPU usage, in percent of all cores, below which a device is idle."""

RuleInputs: TypeAlias = Mapping[str, float | None]
"""The values of the rule variables on a device; None or missing: the device has no such value."""

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_EXPECTED_TEXT: Final = {
    "<": "should be below {}",
    "<=": "should be at most {}",
    ">": "should be above {}",
    ">=": "should be at least {}",
    "==": "should be {}",
    "!=": "should not be {}",
}
_OPPOSITE: Final = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def is_satisfied(rule: Rule, inputs: RuleInputs) -> bool:
    match rule:
        case And(parts=parts):
            return all(is_satisfied(part, inputs) for part in parts)
        case Or(parts=parts):
            return any(is_satisfied(part, inputs) for part in parts)
        case Not(part=part):
            return not is_satisfied(part, inputs)
        case leaf:
            return _is_predicate_satisfied(leaf, inputs)


def unmet_reason(rule: Rule, inputs: RuleInputs) -> str | None:
    """Describe the failing part of *rule* with its values: ``labelled is 12, and should be at least 64``.

    Failing parts joined by ``or`` read "either …, or …": one of them would be enough.
    """
    return _unmet_part(rule, inputs, wanted=True)


def clock_inputs(local: datetime) -> dict[str, float]:
    """Return the rule variables ``hour`` and ``weekday`` of a local time."""
    return {"hour": local.hour + local.minute / 60 + local.second / 3600, "weekday": float(local.weekday())}


def input_value(name: str, inputs: RuleInputs) -> float:
    """Return the value of the variable *name*, or its `absent` value."""
    value = inputs.get(name)
    return RULE_VARIABLES[name].default if value is None else float(value)


def _is_predicate_satisfied(leaf: Predicate, inputs: RuleInputs) -> bool:
    value = input_value(leaf.name, inputs)
    match leaf:
        case FlagCheck():
            return value != 0
        case Comparison(op=op, value=limit):
            return _COMPARE[op](_floor_hour(leaf.name, value), limit)
        case InRange(low=low, high=high):
            return _is_in_range(RULE_VARIABLES[leaf.name].kind, value, low, high)
        case _:
            assert_never(leaf)


def _floor_hour(name: str, value: float) -> float:
    """Round an hour down, so that ``hour == 6`` matches the whole hour; other variables are unchanged."""
    return float(int(value)) if RULE_VARIABLES[name].kind is VariableKind.HOUR else value


def _is_in_range(kind: VariableKind, value: float, low: float, high: float) -> bool:
    if kind is VariableKind.HOUR:
        return low <= value < high if low < high else value >= low or value < high
    if low > high and kind in CYCLIC_KINDS:
        return value >= low or value <= high
    return low <= value <= high


def _unmet_part(rule: Rule, inputs: RuleInputs, *, wanted: bool) -> str | None:
    """Describe why the truth value of *rule* is not *wanted*; None if it is."""
    if is_satisfied(rule, inputs) is wanted:
        return None
    match rule:
        case Not(part=part):
            return _unmet_part(part, inputs, wanted=not wanted)
        case And(parts=parts) | Or(parts=parts):
            found = (_unmet_part(part, inputs, wanted=wanted) for part in parts)
            reasons = list(dict.fromkeys(filter(None, found)))
            if len(reasons) > 1 and isinstance(rule, Or) is wanted:  # one of them would be enough
                return f"either {', or '.join(reasons)}"
            return ", and ".join(reasons)
        case leaf:
            return _describe_predicate(leaf, inputs, wanted=wanted)


def _describe_predicate(leaf: Predicate, inputs: RuleInputs, *, wanted: bool) -> str:
    kind = RULE_VARIABLES[leaf.name].kind
    if isinstance(leaf, FlagCheck):
        return _describe_flag(leaf.name, wanted=wanted)
    is_present = inputs.get(leaf.name) is not None
    value = format_value(kind, input_value(leaf.name, inputs)) + ("" if is_present else " (not available)")
    if isinstance(leaf, Comparison):
        should = _EXPECTED_TEXT[leaf.op if wanted else _OPPOSITE[leaf.op]].format(
            format_value(kind, leaf.value)
        )
    else:
        to = "before" if kind is VariableKind.HOUR else "to"
        low, high = format_value(kind, leaf.low), format_value(kind, leaf.high)
        should = f"should {'' if wanted else 'not '}be from {low} {to} {high}"
    return f"{leaf.name} is {value}, and {should}"


def _describe_flag(name: str, *, wanted: bool) -> str:
    texts = {
        "charging": ("the device is not charging", "the device is charging, and should not be"),
        "idle": ("the device is not idle", "the device is idle, and should not be"),
        "gpu": ("the device has no GPU", "the device has a GPU, and should not"),
    }
    return texts[name][0 if wanted else 1]


def format_value(kind: VariableKind, value: float) -> str:
    """Format *value* with its unit: ``64``, ``30 %``, ``22:30``, ``sat``, ``1.5 h``."""
    match kind:
        case VariableKind.PERCENT:
            return f"{value:.3g} %"
        case VariableKind.CELSIUS:
            return f"{value:.3g} °C"
        case VariableKind.HOUR:
            return f"{int(value):02d}:{int(value % 1 * 60):02d}"
        case VariableKind.WEEKDAY:
            return DAYS[int(value) % 7]
        case VariableKind.LENGTH:
            return _format_duration(value)
        case _:
            return f"{value:.10g}"


def _format_duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "for ever"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
