"""Exceptions in log lines: type, message and frames, each within a limit.

Never the local variables of frames: those of a ClientApp hold training data, others hold secrets.
"""

import traceback
from typing import Any, Final

from structlog.dev import RichTracebackFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import ExcInfo

MAX_FRAMES: Final = 30
"""Frames of each exception; of more, the last ones, which are nearest to the raise."""
MESSAGE_CHARS: Final = 1000
"""Characters of a message and of each note."""
CHAIN_LENGTH: Final = 10
"""Exceptions in a chain of causes, and in a group."""
STACK_CHARS: Final = 16_000
"""Characters of a stack trace as text."""

_transform: Final = ExceptionDictTransformer(show_locals=False, use_rich=False)
as_text: Final = RichTracebackFormatter(show_locals=False, max_frames=MAX_FRAMES)
"""For a terminal."""


def as_json_objects(exc_info: ExcInfo) -> list[dict[str, Any]]:
    """Convert for JSON: one object for the exception and for each of its causes."""
    return _limited(_transform(exc_info))


def as_attributes(error: BaseException) -> dict[str, str]:
    """Convert for OTLP, with the attribute names of OpenTelemetry's conventions."""
    stack = "".join(traceback.format_exception(error, limit=-MAX_FRAMES))
    return {
        "exception.type": type(error).__name__,
        "exception.message": _shorten(str(error), MESSAGE_CHARS),
        "exception.stacktrace": _shorten(stack, STACK_CHARS),
    }


def _limited(chain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for one in chain[:CHAIN_LENGTH]:
        one["frames"] = one["frames"][-MAX_FRAMES:]
        one["exc_value"] = _shorten(one["exc_value"], MESSAGE_CHARS)
        one["exc_notes"] = [_shorten(note, MESSAGE_CHARS) for note in one["exc_notes"][:CHAIN_LENGTH]]
        one["exceptions"] = [_limited(inner) for inner in one["exceptions"][:CHAIN_LENGTH]]
    return chain[:CHAIN_LENGTH]


def _shorten(text: str, limit: int) -> str:
    """Keep the beginning and the end of a *text* of more than *limit* characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
