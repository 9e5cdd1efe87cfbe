"""Texts of the problems of a profile: place, key, value, and the valid values."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Final, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedbus.simulation.profiles.durations import (
    ConstantDuration,
    ExponentialDuration,
    LognormalDuration,
    NormalDuration,
    UniformDuration,
)
from fedbus.simulation.profiles.schema import Profile

MAX_PROBLEMS: Final = 5
"""Problems of one profile that an error names."""
DISTRIBUTIONS: Final = tuple(
    str(get_args(model.model_fields["distribution"].annotation)[0])
    for model in (ConstantDuration, UniformDuration, NormalDuration, LognormalDuration, ExponentialDuration)
)

Keys: TypeAlias = tuple[str | int, ...]
Lines: TypeAlias = Mapping[Keys, int]
"""The line of each key of a document."""

_MAPPING: Final = "must be a mapping of keys and values"
_DURATION: Final = "must be a number of seconds, or a mapping with `distribution`"
_NUMBER: Final = "must be a number"
_INTEGER: Final = "must be an integer"
_LIST: Final = "must be a list"
_RULES: Final = {
    "greater_than_equal": "must be ≥ {ge}",
    "greater_than": "must be > {gt}",
    "less_than_equal": "must be ≤ {le}",
    "less_than": "must be < {lt}",
    "finite_number": "must be a finite number",
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "int_parsing": _INTEGER,
    "int_type": _INTEGER,
    "int_from_float": _INTEGER,
    "literal_error": "must be one of: {expected}",
    "union_tag_not_found": _DURATION,
    "model_attributes_type": _DURATION,
    "model_type": _MAPPING,
    "dict_type": _MAPPING,
    "tuple_type": _LIST,
    "list_type": _LIST,
    "is_instance_of": _LIST,
    "sequence_str": _LIST,
    "too_short": "must not be empty",
    "too_long": "has too many values (limit {max_length})",
    "string_pattern_mismatch": "is not a valid name: use letters, digits, spaces, hyphens, dots and underscores",
    "string_type": "must be text",
}
"""The rule that a value breaks, by pydantic's type of the error."""


def describe_problems(error: ValidationError, document: Any, name: str, lines: Lines) -> str:
    """Describe the first problems of the profile *document* in one line."""
    problems = list(
        dict.fromkeys(_describe_one(one, document, name, lines) for one in error.errors(include_url=False))
    )
    more = len(problems) - MAX_PROBLEMS
    return "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def find_line(lines: Lines, keys: Keys) -> int:
    """Return the line of *keys*, or of the innermost section around it."""
    return next((lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in lines), 1)


def join_keys(keys: Keys) -> str:
    """Join keys to a path: ``groups.phone.delay``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _describe_one(error: ErrorDetails, document: Any, name: str, lines: Lines) -> str:
    keys = _keys_in_document(error["loc"], document)
    place = f"{name}:{find_line(lines, keys)}: {join_keys(keys)}".removesuffix(": ")
    value, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        return f"{place} is not a known key. {_suggest(keys, document)}"
    if kind == "missing":
        return f"{place} is missing"
    if kind == "union_tag_invalid":
        return f"{place}: {_describe_distribution(value)}"
    if kind in _RULES:
        bounds = {key: format(bound, "g") for key, bound in error.get("ctx", {}).items() if _is_number(bound)}
        return f"{place}: {_show(value)} {_RULES[kind].format(**{**error.get('ctx', {}), **bounds})}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}"


def _describe_distribution(value: object) -> str:
    tag = value.get("distribution") if isinstance(value, Mapping) else value
    close = difflib.get_close_matches(str(tag), DISTRIBUTIONS, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"distribution {_show(tag)} is not known. {hint}Valid: {', '.join(DISTRIBUTIONS)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keys_in_document(location: Sequence[str | int], document: Any) -> Keys:
    """Return the keys of *location* without the parts that pydantic adds: the tag of a union, ``[key]``."""
    keys: list[str | int] = []
    node = document
    for part in location:
        if part == "[key]":
            break
        if isinstance(node, dict) and (part in node or part == location[-1]):
            if part not in node and part in DISTRIBUTIONS:
                continue
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            continue
        keys.append(part)
    return tuple(keys)


def _suggest(keys: Keys, document: Any) -> str:
    valid = valid_keys(keys[:-1], document)
    close = difflib.get_close_matches(str(keys[-1]), valid, n=1)
    return f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(valid)}"


def valid_keys(keys: Keys, document: Any = None) -> list[str]:
    """Return the keys of the section *keys* of a profile; for a distribution, those of the one in *document*."""
    annotation: Any = Profile
    node = document
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
        models = list(_models_in(annotation))
        fields = {field.alias: field for model in models for field in model.model_fields.values()}
        if key in fields:
            annotation = fields[str(key)].annotation
        else:  # the name of a group
            annotation = get_args(annotation)[1] if get_args(annotation) else Profile
    tag = node.get("distribution", "constant") if isinstance(node, dict) else "constant"
    chosen = [
        model
        for model in _models_in(annotation)
        if "distribution" not in model.model_fields
        or tag in get_args(model.model_fields["distribution"].annotation)
    ]
    return list(dict.fromkeys(str(field.alias) for model in chosen for field in model.model_fields.values()))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _models_in(part)


def _show(value: object) -> str:
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = TypeAdapter(Any).dump_json(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}…"
