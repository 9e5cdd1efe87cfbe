"""Overrides of a task's run configuration: as users write them, ``lr=0.1``, and as values, ``{"lr": 0.1}``."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

Scalar: TypeAlias = bool | int | float | str

MAX_NAMED_KEYS: Final = 12
"""Known keys in an error, if no key is similar."""
_KINDS: Final = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}


class InvalidOverride(ValueError):
    """An override names an unknown key, or its value does not fit. The text names the key and what to do."""


def parse_override_of(known: Mapping[str, Scalar], key: str, text: str) -> Scalar:
    """Parse *text* as a new value of *key*, with the type of the value in *known*, the task's run configuration.

    Raises:
        InvalidOverride: *known* has no such key, or *text* is no value of its type.

    """
    default = _default_of(known, key)
    text = text.strip()
    value = _parse(type(default), text)
    if value is None:
        raise InvalidOverride(
            f"`{key}` = {text}: use {_KINDS[type(default)]}; the task has {_render(default)}"
        )
    return value


def check_overrides(known: Mapping[str, Scalar], overrides: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return *overrides* with the types of the values in *known*, the task's run configuration.

    An integer becomes a float where the task has a float. No other type is converted.

    Raises:
        InvalidOverride: *known* lacks a key, or a value has another type or is not finite.

    """
    return {key: _check(_default_of(known, key), key, value) for key, value in overrides.items()}


def _default_of(known: Mapping[str, Scalar], key: str) -> Scalar:
    if key not in known:
        raise InvalidOverride(
            f"the run configuration of the task has no key `{key}`: {suggest_key(key, known)}"
        )
    return known[key]


def _check(default: Scalar, key: str, value: Scalar) -> Scalar:
    """Return *value* with the type of *default*, the task's value of *key*."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is kind and (not isinstance(value, float) or math.isfinite(value)):
        return value
    hint = f", in quotes inside the option's value: {key}='{_render(value)}'" if kind is str else ""
    raise InvalidOverride(
        f"`{key}` = {_render(value)}: use {_KINDS[kind]}{hint}; the task has {_render(default)}"
    )


def suggest_key(key: str, known: Iterable[str]) -> str:
    """Return the keys of *known* that are similar to *key*; all of them, if they are few, without a similar one."""
    names = sorted(known)
    if close := difflib.get_close_matches(key.replace("_", "-"), names, n=3):
        return f"did you mean {' or '.join(f'`{name}`' for name in close)}?"
    if not names:
        return "it has no keys"
    more = f" and {len(names) - MAX_NAMED_KEYS} more" if len(names) > MAX_NAMED_KEYS else ""
    return f"known keys: {', '.join(names[:MAX_NAMED_KEYS])}{more}"


def _parse(kind: type[Scalar], text: str) -> Scalar | None:
    """Return *text* as a value of *kind*; None if it is none."""
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower())
        if kind is int:
            return int(text)
        if kind is float:
            return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _render(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
