"""A message as one line: when, which word, who, about what, and the facts in short."""

from datetime import datetime
from functools import singledispatch
from typing import Any, Final

from pydantic import BaseModel
from rich.text import Text

from fedbus.app.terminal.output import format_size
from fedbus.app.terminal.plain import printable
from fedbus.bus.bus import StoredMessage
from fedbus.contracts.message import Message
from fedbus.contracts.model import Artifact, BlobRef, ModelRef
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan
from fedbus.contracts.server import MessageContent, ServerEvent
from fedbus.contracts.serving import DataCheckResult, FeatureDistribution
from fedbus.contracts.transition import Transition

HIDDEN_FIELDS: Final = {"task", "run", "round", "client", "message_id", "reply_to", "created_at"}
"""Fields that the line shows in another place, or that only programs need."""
MIN_SHOWN: Final = 0.001
WHOLE_FROM: Final = 1000
"""From here on a number is told without its fraction."""
COLUMN_WIDTHS: Final = (20, 28, 14)
"""For the word, who said it, and about what."""
WIDE_TERMINAL: Final = 110
"""So wide a terminal has room for them, and for the facts."""
COLOURS: Final = {
    "cast": "magenta",
    "cmd": "blue",
    "client": "cyan",
    "local": "dim",
    "srv": "yellow",
    "life": "green",
    "svc": "white",
}


def render_line(seen: StoredMessage, *, width: int = WIDE_TERMINAL) -> Text:
    """*seen* for a person; in columns where *width* has room for them."""
    message, envelope = seen.message, seen.envelope
    bad = any(word in message.word for word in ("fail", "refused", "lost", "declined"))
    columns = COLUMN_WIDTHS if width >= WIDE_TERMINAL else (0, 0, 0)
    said, by, of = (f"{text:<{column}} " for text, column in zip(_line_head(seen), columns, strict=True))
    told = Text.assemble(
        (f"{format_time(envelope.time)}  ", "dim"),
        (said, "red" if bad else COLOURS.get(str(message.family), "")),
        (by, "bold"),
        of,
        *describe_facts(message),
    )
    told.plain = printable(told.plain)
    return told


def _line_head(seen: StoredMessage) -> tuple[str, str, str]:
    return message_name(seen.message), sender_of(seen.envelope.source), entity_of(seen.message)


def message_record(seen: StoredMessage) -> dict[str, Any]:
    """*seen* for a program."""
    envelope = seen.envelope
    return {
        "time": envelope.time.isoformat(),
        "word": seen.message.word,
        "subject": seen.subject,
        "sequence": seen.sequence,
        "id": envelope.id,
        "type": envelope.type,
        "source": envelope.source,
        "about": envelope.subject,
        "trace": dict(envelope.trace),
        "body": seen.message.model_dump(mode="json"),
    }


def format_time(time: datetime) -> str:
    return time.astimezone().strftime("%H:%M:%S.") + f"{time.microsecond // 1000:03d}"


def message_name(message: Message) -> str:
    return message.facts.kind if isinstance(message, Transition) else message.word


def sender_of(source: str) -> str:
    """The agent, and whose it is: ``flower-client c1``."""
    agent, _, owner = source.removeprefix("fedbus/").partition("/")[2].partition("/")
    return f"{agent} {owner}" if owner != "server" else agent


def entity_of(message: Message) -> str:
    return message.thing if isinstance(message, Transition) else message.about


def describe_facts(message: Message) -> list[str | tuple[str, str]]:
    """What a message says beyond its word: the move of a lifecycle, or its fields in short."""
    if isinstance(message, Transition):
        is_about_the_store = message.event == ServerEvent.STORE_UNAVAILABLE
        trouble = getattr(message.facts, "trouble", None) if is_about_the_store else None
        kind = f" ({trouble})" if trouble else ""
        reason = f": {message.reason}" if message.reason else ""
        return [(f"{message.source or '•'} → {message.target}", "bold"), f" on {message.event}{kind}{reason}"]
    said = [(name, short_text(getattr(message, name))) for name in type(message).model_fields]
    return [" ".join(f"{name}={text}" for name, text in said if text and name not in HIDDEN_FIELDS)]


@singledispatch
def short_text(value: object) -> str:
    """A value in a word or two; nothing for what is empty."""
    return "" if value in (None, "", False, ()) else str(value)


@short_text.register
def _(value: float) -> str:
    """Without an exponent: a line is read by people; programs have `record`."""
    if 0 < abs(value) < MIN_SHOWN:
        return f"<{MIN_SHOWN}" if value > 0 else f">-{MIN_SHOWN}"
    return f"{value:.0f}" if abs(value) >= WHOLE_FROM else f"{value:.4g}"


@short_text.register
def _(value: datetime) -> str:
    return format_time(value)


@short_text.register
def _(value: tuple) -> str:  # type: ignore[type-arg]
    return ",".join(short_text(item) or str(item) for item in value)


@short_text.register
def _(value: dict) -> str:  # type: ignore[type-arg]
    return ",".join(name if item is True else f"{name}:{short_text(item)}" for name, item in value.items())


@short_text.register
def _(value: BlobRef) -> str:
    return f"{value.sha256[:8]}({format_size(value.size_bytes)})"


@short_text.register
def _(value: Artifact) -> str:
    return f"{value.sha256[:8]}({format_size(value.size_bytes)})"


@short_text.register
def _(value: ModelRef) -> str:
    return f"v{value.version}:{value.sha256[:8]}"


@short_text.register
def _(value: RunPlan) -> str:
    return f"{value.rounds}-rounds,quorum-{value.quorum}"


@short_text.register
def _(value: RunOverrides) -> str:
    given = value.model_dump(include=set(RunOverrides.model_fields), exclude_defaults=True)
    return ",".join(f"{name}-{one}" for name, one in given.items() if name != "config") or "none"


@short_text.register
def _(value: RoundResult) -> str:
    metrics = {
        "loss": value.loss,
        "accuracy": value.accuracy,
        "s": value.seconds,
        "clients": len(value.participants),
    }
    return ",".join(f"{name}:{short_text(figure)}" for name, figure in metrics.items() if figure is not None)


@short_text.register
def _(value: MessageContent) -> str:
    return short_text(value.blob) if value.blob else f"({format_size(len(value.inline or b''))})"


@short_text.register
def _(value: DataCheckResult) -> str:
    return f"{value.check}:ok" if value.ok else f"{value.check}:{value.value:.2g}"


@short_text.register
def _(value: FeatureDistribution) -> str:
    return f"{value.feature}:{short_text(value.psi)}"


@short_text.register
def _(value: BaseModel) -> str:
    said = {name: getattr(value, name) for name in type(value).model_fields}
    return ",".join(
        f"{name}:{short_text(one) or one}"
        for name, one in said.items()
        if one is not None and one not in ("", ())
    )
