"""Log lines: of fedbus and of all libraries, on standard error, one line each.

FEDBUS_LOG_LEVEL   debug, info, warning, error or critical; at debug, agents tell of each step they take
FEDBUS_LOG_FORMAT  console or json; default: console on a terminal, else json
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
from fedbus.app.telemetry.log_buffer import AtOnce, WrittenLater
from fedbus.app.telemetry_settings import FORMAT, FORMATS, LEVEL
from fedbus.contracts.telemetry import LOG_LINES, add

SAID_AGAIN_AFTER_S: Final = 60.0
as_json: Final = json.JSONEncoder(default=repr).encode
CHATTY: Final = {
    "asyncio": logging.WARNING,
    "aiohttp.access": logging.WARNING,
    "nats": logging.WARNING,
    "urllib3": logging.ERROR,  # a collector that is away is told of by OpenTelemetry, and once
}
"""Libraries, and from which level on their lines are worth having."""


def log_to_stderr(*, level: str = "INFO", **about: str) -> None:
    """Log lines of fedbus and of all libraries on standard error. FEDBUS_LOG_LEVEL overrules *level*."""
    number = level_of(os.environ.get(LEVEL) or level, level)
    readable = _is_readable(os.environ.get(FORMAT, ""))
    structlog.configure(
        processors=[ProcessorFormatter.wrap_for_formatter],  # all the rest is done when the line is written
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    writer = logging.StreamHandler() if readable else AtOnce()
    writer.addFilter(_says_something)
    writer.addFilter(OneLineOfOpenTelemetry())
    writer.addFilter(_counted)
    writer.setFormatter(OneLine(about, readable=readable))
    # a person at a terminal waits for the line
    handler = WrittenLater(writer) if isinstance(writer, AtOnce) else writer
    logging.basicConfig(handlers=[handler], level=number, force=True)
    logging._srcfile = None  # noqa: SLF001  # who called is in no line, and looking for it costs most of one
    for name, least in CHATTY.items():
        logging.getLogger(name).setLevel(least)


def written() -> None:
    """Write all lines that wait."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def told_once(library: str) -> None:
    """A library that writes its lines by itself, from a level of its own, leaves both to us: ours have their trace."""
    its = logging.getLogger(library)
    its.handlers.clear()
    its.setLevel(logging.NOTSET)


def level_of(asked: str, otherwise: str) -> int:
    """The number of the level *asked* for; a word that is none counts as the other."""
    names = logging.getLevelNamesMapping()
    return names.get(asked.strip().upper(), names[otherwise.upper()])


def _is_readable(asked: str) -> bool:
    return asked == "console" if asked in FORMATS else sys.stderr.isatty()


def _rendered(*, readable: bool) -> list[Processor]:
    if readable:
        return [structlog.dev.ConsoleRenderer(pad_event_to=0, exception_formatter=exceptions.as_text)]
    return [
        structlog.processors.ExceptionRenderer(exceptions.as_facts),
        lambda _logger, _level, line: as_json(line),
    ]


class OneLine(logging.Formatter):
    """Makes a line of what fedbus or a library said, with the facts *about* this process in each.

    Not structlog's ProcessorFormatter: it copies the record and formats it once more, which made 13 µs a line into 21.
    """

    def __init__(self, about: dict[str, str], *, readable: bool) -> None:
        super().__init__()
        self._about: dict[str, Any] = dict(about)
        self._at = _at_short if readable else _at
        self._renderers = _rendered(readable=readable)

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        line: Any = structlog.contextvars.merge_contextvars(None, level, self._about | _said(record))
        line |= {"level": level, "logger": record.name, "timestamp": self._at(record.created)} | _its_trace()
        for render in self._renderers:
            line = render(None, level, line)
        return str(line)


def _said(record: logging.LogRecord) -> dict[str, Any]:
    """What is in *record*: facts of structlog's, or the words of a library."""
    if isinstance(record.msg, dict) and hasattr(record, "_logger"):  # which `wrap_for_formatter` puts there
        return record.msg
    more = {"exc_info": record.exc_info, "stack_info": record.stack_info}
    return {"event": record.getMessage()} | {name: value for name, value in more.items() if value}


def _its_trace() -> dict[str, str]:
    """Where it was said."""
    here = trace.get_current_span().get_span_context()
    if not here.is_valid:
        return {}
    return {"trace_id": f"{here.trace_id:032x}", "span_id": f"{here.span_id:016x}"}


def _at(said: float) -> str:
    """When it was said, which is not when it is written."""
    moment = datetime.fromtimestamp(said, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _at_short(said: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(said))


def errors_so_far() -> tuple[int, str]:
    """How many error lines this process has written, and the last of them."""
    return _errors.count, _errors.last


def _says_something(record: logging.LogRecord) -> bool:
    """Flower sets its lines apart by blank ones, which tell nothing where each line is a fact."""
    return not isinstance(record.msg, str) or bool(record.msg.strip())


@dataclass
class _Errors:
    count: int = 0
    last: str = ""


_errors: Final = _Errors()


def _counted(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        _errors.count += 1
        _errors.last = (
            str(record.msg.get("event", "")) if isinstance(record.msg, dict) else record.getMessage()
        )
    if record.levelno >= logging.WARNING:
        add(LOG_LINES, {"fedbus.level": record.levelname.lower()})
    return True


class OneLineOfOpenTelemetry(logging.Filter):
    """Its exporters tell of an absent collector over and over, with stack traces: one line a minute is enough."""

    def __init__(self) -> None:
        super().__init__()
        self._said = -SAID_AGAIN_AFTER_S

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        record.exc_info = record.exc_text = record.stack_info = None
        now = time.monotonic()
        if now - self._said < SAID_AGAIN_AFTER_S:
            return False
        self._said = now
        return True
