"""A message as a browser is told of it: JSON that is written once, however many look.

    {"s": "l", "n": 812, "at": "…", "word": "transition", "subject": "fedbus.dev.life.client.c1.mnist",
     "source": "…", "about": "…", "trace": "4bf9…", "id": "0195…", "cause": "0195…", "body": {…}}

``s`` and ``n`` say where it stands: in the events stream (``e``) or the life stream (``l``), and at which
sequence. What is long is cut, with a mark that says so; the whole is had by `whole`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fedbus.bus.bus import StoredMessage
from fedbus.contracts.message import Family

EVENTS: Final = "e"
LIFECYCLE: Final = "l"
MAX_TEXT_CHARS: Final = 2_000
"""Characters of one string."""
MAX_ITEMS: Final = 2_000
"""Entries of one list or table."""


@dataclass(frozen=True, slots=True)
class FeedRecord:
    """One message of a stream, told."""

    stream: str
    sequence: int
    id: str
    cause: str
    """The id of the message that led to it, where there was one."""
    subject: str
    at: datetime
    trace: str
    """The trace id, where there is one."""
    speaker: str
    """Whose agent said it: a client's id, ``server`` or ``people``."""
    json: str


def to_record(seen: StoredMessage) -> FeedRecord:
    """*seen* as the feed tells it, cut to what a page can show."""
    return _record(seen, truncate)


def to_full_record(seen: StoredMessage) -> FeedRecord:
    """*seen* with all that its body says."""
    return _record(seen, lambda told: told)


def _record(seen: StoredMessage, shorten: Callable[[Any], Any]) -> FeedRecord:
    stream = LIFECYCLE if seen.message.family is Family.LIFE else EVENTS
    trace = trace_id(seen.envelope.trace.get("traceparent", ""))
    told = {
        "s": stream,
        "n": seen.sequence,
        "id": seen.envelope.id,
        "cause": seen.envelope.cause,
        "at": seen.envelope.time.isoformat(timespec="milliseconds"),
        "word": seen.message.word,
        "subject": seen.subject,
        "source": seen.envelope.source,
        "about": seen.envelope.subject,
        "trace": trace,
        "body": to_jsonable(seen.message.model_dump(mode="python")),
    }
    return FeedRecord(
        stream=stream,
        sequence=seen.sequence,
        id=seen.envelope.id,
        cause=seen.envelope.cause,
        subject=seen.subject,
        at=seen.envelope.time,
        trace=trace,
        speaker=seen.envelope.source.rpartition("/")[2],
        json=json.dumps(shorten(told), ensure_ascii=False, allow_nan=False),
    )


def trace_id(traceparent: str) -> str:
    """The second part of a W3C ``traceparent``; nothing where it is none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


def to_jsonable(value: Any) -> Any:
    """*value* in what JSON has: times as ISO 8601, bytes by their size and beginning, "nan" as text."""
    match value:
        case dict():
            return {str(name): to_jsonable(item) for name, item in value.items()}
        case list() | tuple():
            return [to_jsonable(item) for item in value]
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime():
            return value.isoformat(timespec="milliseconds")
        case bytes():
            return f"<{len(value)} bytes: {value[:16].hex()}{'…' if len(value) > 16 else ''}>"
        case _:
            return str(value).encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def truncate(value: Any) -> Any:
    """*value* with long texts, lists and tables cut, and a mark where."""
    match value:
        case str() if len(value) > MAX_TEXT_CHARS:
            return f"{value[:MAX_TEXT_CHARS]}… ({len(value)} characters)"
        case dict():
            kept = list(value.items())[:MAX_ITEMS]
            more = {"…": f"{len(value) - MAX_ITEMS} more"} if len(value) > MAX_ITEMS else {}
            return {truncate(name): truncate(item) for name, item in kept} | more
        case list():
            more_items = [f"… {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else []
            return [truncate(item) for item in value[:MAX_ITEMS]] + more_items
        case _:
            return value
