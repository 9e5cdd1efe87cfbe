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
from fedbus.contracts.expressions.parser import Expression, Token, Tokens, parse

__all__ = ["WORDS", "BadRule", "Check", "Flag", "Kind", "Leaf", "Rule", "Within", "Word", "rule"]


class Kind(StrEnum):
    """What sort of thing a word is, and so what it can be compared with."""

    COUNT = "count"
    PERCENT = "percent"
    CELSIUS = "celsius"
    HOUR = "hour"
    WEEKDAY = "weekday"
    LENGTH = "length of time"
    FLAG = "flag"


@dataclass(frozen=True)
class Word:
    """Something that a rule may speak of."""

    kind: Kind
    says: str
    absent: float
    """What it counts as where the device has no such thing; of a flag 1 is yes."""


FOREVER: Final = float("inf")
WORDS: Final[dict[str, Word]] = {
    "labelled": Word(Kind.COUNT, "captured rows with a label that training may use", 0),
    "unlabelled": Word(Kind.COUNT, "captured rows without a label", 0),
    "cpu": Word(Kind.PERCENT, "how busy all cores together are", 0),
    "memory": Word(Kind.PERCENT, "how much of the memory is in use", 0),
    "disk": Word(Kind.PERCENT, "how full the disk is that fedbus writes to", 0),
    "battery": Word(Kind.PERCENT, "its charge; without a battery it counts as full", 100),
    "charging": Word(Kind.FLAG, "on mains; without a battery it counts as charging", 1),
    "idle": Word(Kind.FLAG, "the cores are less than 20 % busy", 1),
    "gpu": Word(Kind.FLAG, "there is a GPU", 0),
    "temperature": Word(Kind.CELSIUS, "the hottest sensor; without a sensor it counts as 0", 0),
    "hour": Word(Kind.HOUR, "the local time of day, 0 to 24; half past six is 6.5", 0),
    "weekday": Word(Kind.WEEKDAY, "the local day: mon, tue, wed, thu, fri, sat, sun", 0),
    "model_age": Word(Kind.LENGTH, "since the served model came; before there is one, for ever", FOREVER),
}

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
SECONDS: Final[dict[str, float]] = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
UNITS: Final[dict[Kind, dict[str, float]]] = {
    Kind.COUNT: {"": 1},
    Kind.PERCENT: {"": 1, "%": 1},
    Kind.CELSIUS: {"": 1, "C": 1},
    Kind.HOUR: {"": 1, "h": 1},
    Kind.LENGTH: SECONDS,
}
LARGEST: Final = {Kind.PERCENT: 100.0, Kind.HOUR: 24.0}
ROUND_THE_CLOCK: Final = {Kind.HOUR, Kind.WEEKDAY}
"""After the last comes the first: only these may be in a range that ends before it begins."""
COMPARISONS: Final = ("<=", ">=", "==", "!=", "<", ">")


@dataclass(frozen=True)
class Check:
    """``labelled >= 64``."""

    name: str
    op: str
    value: float


@dataclass(frozen=True)
class Within:
    """``hour in 22..6``: from *low* on and, of hours, before *high*; of anything else *high* is still within."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Flag:
    """``charging``."""

    name: str


Leaf: TypeAlias = Check | Within | Flag
Rule: TypeAlias = Expression[Leaf]


def rule(text: str, *, words: dict[str, Word] = WORDS) -> Rule:
    """The rule in *text*; raises BadRule. *words*: all that it may speak of."""
    return parse(text, lambda tokens: _leaf(tokens, words))


def _leaf(tokens: Tokens, words: dict[str, Word]) -> Leaf:
    word = _word(tokens, words)
    name, kind = word.text, words[word.text].kind
    if kind is Kind.FLAG:
        if tokens.here.text in (*COMPARISONS, "in"):
            tokens.wrong(f"{name} is yes or no and is compared with nothing: write `{name}` or `not {name}`")
        return Flag(name)
    if tokens.takes("in"):
        return _within(tokens, name, kind)
    op = tokens.here
    if not tokens.takes(*COMPARISONS):
        tokens.wrong(f"{name} needs a comparison: {' '.join(COMPARISONS)} or `in`")
    return Check(name, op.text, _value(tokens, name, kind))


def _word(tokens: Tokens, words: dict[str, Word]) -> Token:
    here = tokens.here
    if here.kind != "name" or here.text in ("and", "or", "in"):
        tokens.wrong(f"expected one of {', '.join(words)}" + (f", not {here.text!r}" if here.text else ""))
    if here.text not in words:
        near = difflib.get_close_matches(here.text, words, n=1)
        known = f"did you mean {near[0]}?" if near else f"a rule can speak of {', '.join(words)}"
        tokens.wrong(f"nothing is called {here.text!r}: {known}")
    return tokens.take()


def _within(tokens: Tokens, name: str, kind: Kind) -> Within:
    start = tokens.here.at
    low = _value(tokens, name, kind)
    if not tokens.takes(".."):
        tokens.wrong("a range is written from..to, as in `hour in 22..6`")
    high = _value(tokens, name, kind)
    if low > high and kind not in ROUND_THE_CLOCK:
        tokens.wrong("this range ends before it begins", start)
    if low == high and kind is Kind.HOUR:
        tokens.wrong("this range is empty: the hour it ends with is not in it", start)
    return Within(name, low, high)


def _value(tokens: Tokens, name: str, kind: Kind) -> float:
    here = tokens.here
    if kind is Kind.WEEKDAY:
        if here.text.lower() not in DAYS:
            tokens.wrong(f"{name} is one of {', '.join(DAYS)}")
        return float(DAYS.index(tokens.take().text.lower()))
    if here.kind != "number":
        tokens.wrong(f"{name} is compared with a number" + (f", not with {here.text!r}" if here.text else ""))
    value = quantity(tokens, UNITS[kind], name)
    if value > LARGEST.get(kind, FOREVER):
        tokens.wrong(f"{name} is at most {LARGEST[kind]:g}", here.at)
    return value


def quantity(tokens: Tokens, units: dict[str, float], name: str) -> float:
    """A number with one of these *units*, in the smallest of them."""
    token = tokens.take()
    digits = token.text.rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = token.text[len(digits) :]
    if unit not in units:
        known = " or ".join(f"{digits}{one}" for one in units if one != "min")
        tokens.wrong(
            f"{name} has no unit {unit!r}: write {known}" if unit else f"{name} needs a unit: {known}",
            token.at,
        )
    if (value := float(digits) * units[unit]) == FOREVER:
        tokens.wrong("this number is too large", token.at)
    return value
