"""Whether a device may take part, by its task's rule; a no names the part that fails and the figures.

`holds` and `why_not` agree: there is a reason exactly where the rule does not hold. What a
device does not have counts as `rules.WORDS` says, so both have an answer on every device.
"""

import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final, TypeAlias, assert_never

from fedbus.contracts.expressions.eligibility_rule import (
    DAYS,
    ROUND_THE_CLOCK,
    WORDS,
    Check,
    Flag,
    Kind,
    Leaf,
    Rule,
    Within,
)
from fedbus.contracts.expressions.parser import And, Not, Or

IDLE_BELOW: Final = 20.0
"""Percent of all cores: a device that is less busy is idle."""

Facts: TypeAlias = Mapping[str, float | None]
"""What is so on the device, by the words of a rule; None, or left out: it has no such thing."""

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_SHOULD: Final = {
    "<": "should be below {}",
    "<=": "should be at most {}",
    ">": "should be above {}",
    ">=": "should be at least {}",
    "==": "should be {}",
    "!=": "should not be {}",
}
_OPPOSITE: Final = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def holds(rule: Rule, facts: Facts) -> bool:
    match rule:
        case And(parts=parts):
            return all(holds(part, facts) for part in parts)
        case Or(parts=parts):
            return any(holds(part, facts) for part in parts)
        case Not(part=part):
            return not holds(part, facts)
        case leaf:
            return _leaf_holds(leaf, facts)


def why_not(rule: Rule, facts: Facts) -> str | None:
    """Which part of *rule* fails, with the figures: ``labelled is 12, and should be at least 64``.

    Of parts joined by ``or`` it says "either … or …": one of them would do.
    """
    return _failing(rule, facts, wanted=True)


def clock_facts(local: datetime) -> dict[str, float]:
    """What a rule may ask of the time of day."""
    return {"hour": local.hour + local.minute / 60 + local.second / 3600, "weekday": float(local.weekday())}


def value_of(name: str, facts: Facts) -> float:
    """The figure that a rule sees under *name*."""
    value = facts.get(name)
    return WORDS[name].absent if value is None else float(value)


def _leaf_holds(leaf: Leaf, facts: Facts) -> bool:
    value = value_of(leaf.name, facts)
    match leaf:
        case Flag():
            return value != 0
        case Check(op=op, value=limit):
            return _COMPARE[op](_floored(leaf.name, value), limit)
        case Within(low=low, high=high):
            return _is_within(WORDS[leaf.name].kind, value, low, high)
        case _:
            assert_never(leaf)


def _floored(name: str, value: float) -> float:
    """``hour == 6`` is the whole hour; no other word is compared so."""
    return float(int(value)) if WORDS[name].kind is Kind.HOUR else value


def _is_within(kind: Kind, value: float, low: float, high: float) -> bool:
    if kind is Kind.HOUR:
        return low <= value < high if low < high else value >= low or value < high
    if low > high and kind in ROUND_THE_CLOCK:
        return value >= low or value <= high
    return low <= value <= high


def _failing(rule: Rule, facts: Facts, *, wanted: bool) -> str | None:
    """Why *rule* is not as *wanted*, or None where it is."""
    if holds(rule, facts) is wanted:
        return None
    match rule:
        case Not(part=part):
            return _failing(part, facts, wanted=not wanted)
        case And(parts=parts) | Or(parts=parts):
            found = (_failing(part, facts, wanted=wanted) for part in parts)
            reasons = list(dict.fromkeys(filter(None, found)))
            if len(reasons) > 1 and isinstance(rule, Or) is wanted:  # to mend one of them will do
                return f"either {', or '.join(reasons)}"
            return ", and ".join(reasons)
        case leaf:
            return _in_words(leaf, facts, wanted=wanted)


def _in_words(leaf: Leaf, facts: Facts, *, wanted: bool) -> str:
    kind = WORDS[leaf.name].kind
    if isinstance(leaf, Flag):
        return _flag(leaf.name, wanted=wanted)
    has = facts.get(leaf.name) is not None
    said = figure(kind, value_of(leaf.name, facts)) + ("" if has else " (there is none)")
    if isinstance(leaf, Check):
        should = _SHOULD[leaf.op if wanted else _OPPOSITE[leaf.op]].format(figure(kind, leaf.value))
    else:
        to = "before" if kind is Kind.HOUR else "to"
        should = f"should {'' if wanted else 'not '}be from {figure(kind, leaf.low)} {to} {figure(kind, leaf.high)}"
    return f"{leaf.name} is {said}, and {should}"


def _flag(name: str, *, wanted: bool) -> str:
    says = {
        "charging": ("it is not charging", "it is charging, and should not be"),
        "idle": ("it is not idle", "it is idle, and should not be"),
        "gpu": ("it has no GPU", "it has a GPU, and should not"),
    }
    return says[name][0 if wanted else 1]


def figure(kind: Kind, value: float) -> str:
    """*value* as a person says it: ``64``, ``30 %``, ``22:30``, ``sat``, ``1.5 h``."""
    match kind:
        case Kind.PERCENT:
            return f"{value:.3g} %"
        case Kind.CELSIUS:
            return f"{value:.3g} °C"
        case Kind.HOUR:
            return f"{int(value):02d}:{int(value % 1 * 60):02d}"
        case Kind.WEEKDAY:
            return DAYS[int(value) % 7]
        case Kind.LENGTH:
            return _length(value)
        case _:
            return f"{value:.10g}"


def _length(seconds: float) -> str:
    if seconds == float("inf"):
        return "for ever"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
