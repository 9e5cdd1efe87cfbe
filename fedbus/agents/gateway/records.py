"""Feed records: a stored message as JSON for browsers, serialized once for all of them.

    {"s": "l", "n": 812, "at": "…", "word": "transition", "subject": "fedbus.dev.life.client.c1.mnist",
     "source": "…", "about": "…", "trace": "4bf9…", "id": "0195…", "cause": "0195…", "body": {…}}

``s`` is the stream, events (``e``) or lifecycle (``l``), and ``n`` the sequence in it. Long values are
truncated and marked; `to_full_record` keeps them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fedbus.bus.stream_reader import StoredMessage
from fedbus.contracts.message import Family

EVENTS: Final = "e"
LIFECYCLE: Final = "l"
MAX_TEXT_CHARS: Final = 2_000
"""Characters of one string."""
MAX_ITEMS: Final = 2_000
"""Entries of one list or table."""


@dataclass(frozen=True, slots=True)
class FeedRecord:
    """One message of a stream."""

    stream: str
    sequence: int
    id: str
    cause: str
    """Id of the message that caused this one, or empty."""
    subject: str
    at: datetime
    trace: str
    """Trace id, or empty."""
    json: str


def to_record(stored: StoredMessage) -> FeedRecord:
    """Convert *stored* to a record, truncated to what a page can show."""
    return _record(stored, truncate)


def to_full_record(stored: StoredMessage) -> FeedRecord:
    """Convert *stored* to a record without truncation."""
    return _record(stored, lambda fields: fields)


def _record(stored: StoredMessage, shorten: Callable[[Any], Any]) -> FeedRecord:
    stream = LIFECYCLE if stored.message.family is Family.LIFE else EVENTS
    trace = trace_id(stored.envelope.trace.get("traceparent", ""))
    fields = {
        "s": stream,
        "n": stored.sequence,
        "id": stored.envelope.id,
        "cause": stored.envelope.cause,
        "at": stored.envelope.time.isoformat(timespec="milliseconds"),
        "word": stored.message.name,
        "subject": stored.subject,
        "source": stored.envelope.source,
        "about": stored.envelope.subject,
        "trace": trace,
        "body": to_jsonable(stored.message.model_dump(mode="python")),
    }
    return FeedRecord(
        stream=stream,
        sequence=stored.sequence,
        id=stored.envelope.id,
        cause=stored.envelope.cause,
        subject=stored.subject,
        at=stored.envelope.time,
        trace=trace,
        json=json.dumps(shorten(fields), ensure_ascii=False, allow_nan=False),
    )


def trace_id(traceparent: str) -> str:
    """Return the trace id of a W3C ``traceparent``, or an empty string if it is invalid."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


def to_jsonable(value: Any) -> Any:
    """Convert *value* to JSON types: times to ISO 8601, bytes to their size and prefix, NaN and infinity to text."""
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
            return str(value).encode("utf-8", "replace").decode()  # a lone surrogate cannot be encoded


def truncate(value: Any) -> Any:
    """Truncate long strings, lists and tables in *value*, and mark where."""
    match value:
        case str() if len(value) > MAX_TEXT_CHARS:
            return f"{value[:MAX_TEXT_CHARS]}… ({len(value)} characters)"
        case dict():
            items = list(value.items())[:MAX_ITEMS]
            more = {"…": f"{len(value) - MAX_ITEMS} more"} if len(value) > MAX_ITEMS else {}
            return {truncate(name): truncate(item) for name, item in items} | more
        case list():
            more_items = [f"… {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else []
            return [truncate(item) for item in value[:MAX_ITEMS]] + more_items
        case _:
            return value
