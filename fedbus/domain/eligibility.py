"""Whether a device may take part, by its task's rule; a no names the part that fails and the figures.

`holds` and `why_not` agree: there is a reason exactly where the rule does not hold. What a
device does not have counts as `rules.WORDS` says, so both have an answer on every device.
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
"""Percent of all cores: a device that is less busy is idle."""

RuleInputs: TypeAlias = Mapping[str, float | None]
"""What is so on the device, by the words of a rule; None, or left out: it has no such thing."""

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


def is_satisfied(rule: Rule, facts: RuleInputs) -> bool:
    match rule:
        case And(parts=parts):
            return all(is_satisfied(part, facts) for part in parts)
        case Or(parts=parts):
            return any(is_satisfied(part, facts) for part in parts)
        case Not(part=part):
            return not is_satisfied(part, facts)
        case leaf:
            return _is_predicate_satisfied(leaf, facts)


def unmet_reason(rule: Rule, facts: RuleInputs) -> str | None:
    """Which part of *rule* fails, with the figures: ``labelled is 12, and should be at least 64``.

    Of parts joined by ``or`` it says "either … or …": one of them would do.
    """
    return _unmet_part(rule, facts, wanted=True)


def clock_inputs(local: datetime) -> dict[str, float]:
    """What a rule may ask of the time of day."""
    return {"hour": local.hour + local.minute / 60 + local.second / 3600, "weekday": float(local.weekday())}


def input_value(name: str, facts: RuleInputs) -> float:
    """The figure that a rule sees under *name*."""
    value = facts.get(name)
    return RULE_VARIABLES[name].absent if value is None else float(value)


def _is_predicate_satisfied(leaf: Predicate, facts: RuleInputs) -> bool:
    value = input_value(leaf.name, facts)
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
    """``hour == 6`` is the whole hour; no other word is compared so."""
    return float(int(value)) if RULE_VARIABLES[name].kind is VariableKind.HOUR else value


def _is_in_range(kind: VariableKind, value: float, low: float, high: float) -> bool:
    if kind is VariableKind.HOUR:
        return low <= value < high if low < high else value >= low or value < high
    if low > high and kind in CYCLIC_KINDS:
        return value >= low or value <= high
    return low <= value <= high


def _unmet_part(rule: Rule, facts: RuleInputs, *, wanted: bool) -> str | None:
    """Why *rule* is not as *wanted*, or None where it is."""
    if is_satisfied(rule, facts) is wanted:
        return None
    match rule:
        case Not(part=part):
            return _unmet_part(part, facts, wanted=not wanted)
        case And(parts=parts) | Or(parts=parts):
            found = (_unmet_part(part, facts, wanted=wanted) for part in parts)
            reasons = list(dict.fromkeys(filter(None, found)))
            if len(reasons) > 1 and isinstance(rule, Or) is wanted:  # to mend one of them will do
                return f"either {', or '.join(reasons)}"
            return ", and ".join(reasons)
        case leaf:
            return _describe_predicate(leaf, facts, wanted=wanted)


def _describe_predicate(leaf: Predicate, facts: RuleInputs, *, wanted: bool) -> str:
    kind = RULE_VARIABLES[leaf.name].kind
    if isinstance(leaf, FlagCheck):
        return _describe_flag(leaf.name, wanted=wanted)
    has = facts.get(leaf.name) is not None
    said = format_value(kind, input_value(leaf.name, facts)) + ("" if has else " (there is none)")
    if isinstance(leaf, Comparison):
        should = _EXPECTED_TEXT[leaf.op if wanted else _OPPOSITE[leaf.op]].format(
            format_value(kind, leaf.value)
        )
    else:
        to = "before" if kind is VariableKind.HOUR else "to"
        low, high = format_value(kind, leaf.low), format_value(kind, leaf.high)
        should = f"should {'' if wanted else 'not '}be from {low} {to} {high}"
    return f"{leaf.name} is {said}, and {should}"


def _describe_flag(name: str, *, wanted: bool) -> str:
    says = {
        "charging": ("it is not charging", "it is charging, and should not be"),
        "idle": ("it is not idle", "it is idle, and should not be"),
        "gpu": ("it has no GPU", "it has a GPU, and should not"),
    }
    return says[name][0 if wanted else 1]


def format_value(kind: VariableKind, value: float) -> str:
    """*value* as a person says it: ``64``, ``30 %``, ``22:30``, ``sat``, ``1.5 h``."""
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
