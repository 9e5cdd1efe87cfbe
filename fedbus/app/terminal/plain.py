"""Output that needs no Rich: JSON for programs, and text without control characters."""

import json
import math
import sys
from datetime import datetime
from typing import Any


def print_json(facts: Any) -> None:
    """Print *facts* as one JSON document: indented on a terminal, otherwise in one line."""
    print(to_json(facts, indent=2 if sys.stdout.isatty() else None), flush=True)


def to_json(facts: Any, indent: int | None = None) -> str:
    """Return *facts* as JSON; characters that control a terminal are escaped."""
    document = json.dumps(to_jsonable(facts), ensure_ascii=False, allow_nan=False, indent=indent)
    return "\n".join(
        line if line.isprintable() else _escape_control_chars(line) for line in document.split("\n")
    )


def _escape_control_chars(line: str) -> str:
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in line)


def to_jsonable(value: Any) -> Any:
    """Convert *value* to JSON types: times to ISO 8601, bytes to their size and prefix, NaN and infinity to text."""
    match value:
        case dict():
            return {str(to_jsonable(name)): to_jsonable(item) for name, item in value.items()}
        case list() | tuple():
            return [to_jsonable(item) for item in value]
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime():
            return value.isoformat()
        case bytes():
            return f"<{len(value)} bytes: {value[:16].hex()}{'…' if len(value) > 16 else ''}>"
        case _:
            return str(value)


def printable(text: str) -> str:
    """Replace the characters of *text* that control a terminal by spaces."""
    return "".join(one if one.isprintable() else " " for one in text)


def pluralize(count: int, noun: str) -> str:
    """Return *count* and *noun*, which gets an "s" unless *count* is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
