"""Log lines of fedbus and of all libraries, on standard error, one line each.

FEDBUS_LOG_LEVEL   debug, info, warning, error or critical; at debug, agents log each method call
FEDBUS_LOG_FORMAT  console or json; default: console on a terminal and for commands that people start, else json
"""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from opentelemetry import trace
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

from fedbus.app.telemetry import exceptions
from fedbus.app.telemetry_settings import FORMAT, FORMATS, LEVEL
from fedbus.contracts.telemetry import LOG_LINES, increment

REPEAT_AFTER_S: Final = 60.0
encode_json: Final = json.JSONEncoder(default=repr).encode
LIBRARY_LEVELS: Final = {
    "asyncio": logging.WARNING,
    "aiohttp.access": logging.WARNING,
    "nats": logging.WARNING,
    "opentelemetry": logging.WARNING,
    "urllib3": logging.ERROR,  # OpenTelemetry logs that a collector is unavailable
}
"""Libraries whose lines below a level are dropped."""


def log_to_stderr(*, level: str = "INFO", log_format: str = "json", **about: str) -> None:
    """Write log lines of fedbus and of all libraries to standard error.

    FEDBUS_LOG_LEVEL overrides *level*, and FEDBUS_LOG_FORMAT *log_format*, the format in a pipe: json or console.
    """
    number = parse_level(os.environ.get(LEVEL) or level, level)
    is_readable = _uses_console_format(os.environ.get(FORMAT, ""), log_format)
    structlog.configure(
        processors=[ProcessorFormatter.wrap_for_formatter],  # the formatter does the rest
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_blank)
    handler.addFilter(OpenTelemetryRateLimit())
    handler.addFilter(_count)
    handler.setFormatter(LineFormatter(about, readable=is_readable))
    logging.basicConfig(handlers=[handler], level=number, force=True)
    logging._srcfile = None  # noqa: SLF001  # no line names its caller, and finding it is most of the cost of a line
    for name, lowest in LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(lowest)


def parse_level(name: str, default: str) -> int:
    """Return the number of the level *name*; that of *default* if there is no such level."""
    names = logging.getLevelNamesMapping()
    return names.get(name.strip().upper(), names[default.upper()])


def _uses_console_format(wanted: str, log_format: str) -> bool:
    """Return whether lines are readable: *wanted* is the format of the environment, *log_format* that in a pipe."""
    if wanted not in FORMATS:
        wanted = "console" if sys.stderr.isatty() else log_format
    return wanted == "console"


def _renderers(*, readable: bool) -> list[Processor]:
    if readable:
        return [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=exceptions.as_text
            )
        ]
    return [
        structlog.processors.ExceptionRenderer(exceptions.as_json_objects),
        lambda _logger, _level, line: encode_json(line),
    ]


class LineFormatter(logging.Formatter):
    """Formats a record of fedbus or of a library, with the keys *about* this process in each line.

    structlog's ProcessorFormatter copies the record and formats it twice: a line takes 21 µs with it, 13 µs here.
    """

    def __init__(self, about: dict[str, str], *, readable: bool) -> None:
        super().__init__()
        self._about: dict[str, Any] = dict(about)
        self._timestamp = _short_timestamp if readable else _timestamp
        self._renderers = _renderers(readable=readable)

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        line: Any = structlog.contextvars.merge_contextvars(None, level, self._about | _keys(record))
        line |= {
            "level": level,
            "logger": record.name,
            "timestamp": self._timestamp(record.created),
        } | _trace_ids()
        for render in self._renderers:
            line = render(None, level, line)
        return str(line)


def _keys(record: logging.LogRecord) -> dict[str, Any]:
    """Return the event and keys of *record*: structlog's, or the message of a library."""
    if isinstance(record.msg, dict) and hasattr(record, "_logger"):  # set by `wrap_for_formatter`
        return record.msg
    more = {"exc_info": record.exc_info, "stack_info": record.stack_info}
    return {"event": record.getMessage()} | {name: value for name, value in more.items() if value}


def _trace_ids() -> dict[str, str]:
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}


def _timestamp(created: float) -> str:
    moment = datetime.fromtimestamp(created, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _short_timestamp(created: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(created))


def plain_text(line: str) -> str:
    """Return the event and the reason of *line* if it is a log line as JSON, else *line*."""
    try:
        keys = json.loads(line)
    except ValueError:
        return line
    if not isinstance(keys, dict) or "event" not in keys:
        return line
    return ": ".join(str(keys[name]) for name in ("event", "reason") if keys.get(name))


def error_summary() -> tuple[int, str]:
    """Return the number of error lines of this process, and the event of the last one."""
    return _errors.count, _errors.last


def _is_not_blank(record: logging.LogRecord) -> bool:
    """Drop the blank lines that some libraries use as separators."""
    return not isinstance(record.msg, str) or bool(record.msg.strip())


@dataclass
class _Errors:
    count: int = 0
    last: str = ""


_errors: Final = _Errors()


def _count(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        _errors.count += 1
        _errors.last = (
            str(record.msg.get("event", "")) if isinstance(record.msg, dict) else record.getMessage()
        )
    if record.levelno >= logging.WARNING:
        increment(LOG_LINES, {"fedbus.level": record.levelname.lower()})
    return True


class OpenTelemetryRateLimit(logging.Filter):
    """Limits OpenTelemetry to one line a minute without stack trace: its exporters log every failed attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -REPEAT_AFTER_S

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        record.exc_info = record.exc_text = record.stack_info = None
        now = time.monotonic()
        if now - self._last < REPEAT_AFTER_S:
            return False
        self._last = now
        return True
