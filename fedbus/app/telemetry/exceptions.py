"""Exceptions as lines tell of them: their type, what they say, and where, each within a bound.

Never what the frames held: a ClientApp that raises has its training data there, and others have secrets.
"""

import traceback
from typing import Any, Final

from structlog.dev import RichTracebackFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import ExcInfo

FRAMES: Final = 30
"""Of each exception: of more, the last, which are the nearest to where it was raised."""
SAYS: Final = 1000
"""Letters of what one says, and of each note."""
WITHIN: Final = 10
"""Exceptions that are told of one: what caused it, and those of a group."""
STACK: Final = 16_000
"""Letters of all of it as text."""

_transform: Final = ExceptionDictTransformer(show_locals=False, use_rich=False)
as_text: Final = RichTracebackFormatter(show_locals=False, max_frames=FRAMES)
"""For a person at a terminal."""


def as_facts(exc_info: ExcInfo) -> list[dict[str, Any]]:
    """For JSON: a table for the exception, and for each that it came of."""
    return _bounded(_transform(exc_info))


def as_attributes(error: BaseException) -> dict[str, str]:
    """For OTLP, by OpenTelemetry's names."""
    stack = "".join(traceback.format_exception(error, limit=-FRAMES))
    return {
        "exception.type": type(error).__name__,
        "exception.message": _cut(str(error), SAYS),
        "exception.stacktrace": _cut(stack, STACK),
    }


def _bounded(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for one in told[:WITHIN]:
        one["frames"] = one["frames"][-FRAMES:]
        one["exc_value"] = _cut(one["exc_value"], SAYS)
        one["exc_notes"] = [_cut(note, SAYS) for note in one["exc_notes"][:WITHIN]]
        one["exceptions"] = [_bounded(inner) for inner in one["exceptions"][:WITHIN]]
    return told[:WITHIN]


def _cut(text: str, letters: int) -> str:
    """The beginning and the end of *text*, where it has more *letters*."""
    return text if len(text) <= letters else f"{text[: letters // 2]} … {text[-letters // 2 :]}"
