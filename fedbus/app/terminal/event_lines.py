"""A message as one line: its time, name, sender and entity, and its fields in short."""

from datetime import datetime
from functools import singledispatch
from typing import Any, Final

from pydantic import BaseModel
from rich.text import Text

from fedbus.app.terminal.output import format_size
from fedbus.app.terminal.plain import printable
from fedbus.bus.stream_reader import StoredMessage
from fedbus.contracts.message import Message
from fedbus.contracts.model import Artifact, BlobRef, ModelRef
from fedbus.contracts.round_messages import MessageContent
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan
from fedbus.contracts.server import ServerEvent
from fedbus.contracts.serving import DataCheckResult, FeatureDistribution
from fedbus.contracts.transition import Transition

HIDDEN_FIELDS: Final = {"task", "run", "round", "client", "message_id", "reply_to", "created_at"}
"""Fields that another column shows, or that only programs need."""
MIN_SHOWN: Final = 0.001
WHOLE_FROM: Final = 1000
"""Numbers from here on are shown without their fraction."""
COLUMN_WIDTHS: Final = (20, 28, 14)
"""The characters for the name of a message, its sender and its entity."""
WIDE_TERMINAL: Final = 110
"""The narrowest terminal that has room for columns."""
COLOURS: Final = {
    "cast": "magenta",
    "cmd": "blue",
    "client": "cyan",
    "local": "dim",
    "srv": "yellow",
    "life": "green",
    "svc": "white",
}


def render_line(stored: StoredMessage, *, width: int = WIDE_TERMINAL) -> Text:
    """Render a message for people, in columns if *width* has room for them."""
    message, envelope = stored.message, stored.envelope
    is_failure = any(part in message.name for part in ("fail", "refused", "lost", "declined"))
    columns = COLUMN_WIDTHS if width >= WIDE_TERMINAL else (0, 0, 0)
    name, sender, entity = (
        f"{text:<{column}} " for text, column in zip(_line_head(stored), columns, strict=True)
    )
    line = Text.assemble(
        (f"{format_time(envelope.time)}  ", "dim"),
        (name, "red" if is_failure else COLOURS.get(str(message.family), "")),
        (sender, "bold"),
        entity,
        *describe_facts(message),
    )
    line.plain = printable(line.plain)
    return line


def _line_head(stored: StoredMessage) -> tuple[str, str, str]:
    return message_name(stored.message), sender_of(stored.envelope.source), entity_of(stored.message)


def message_record(stored: StoredMessage) -> dict[str, Any]:
    """Return a message as JSON data."""
    envelope = stored.envelope
    return {
        "time": envelope.time.isoformat(),
        "word": stored.message.name,
        "subject": stored.subject,
        "sequence": stored.sequence,
        "id": envelope.id,
        "type": envelope.type,
        "source": envelope.source,
        "about": envelope.subject,
        "trace": dict(envelope.trace),
        "body": stored.message.model_dump(mode="json"),
    }


def format_time(time: datetime) -> str:
    return time.astimezone().strftime("%H:%M:%S.") + f"{time.microsecond // 1000:03d}"


def message_name(message: Message) -> str:
    return message.facts.kind if isinstance(message, Transition) else message.name


def sender_of(source: str) -> str:
    """Return the agent of a CloudEvents source and its client: ``flower-client c1``."""
    agent, _, owner = source.removeprefix("fedbus/").partition("/")[2].partition("/")
    return f"{agent} {owner}" if owner != "server" else agent


def entity_of(message: Message) -> str:
    return message.key if isinstance(message, Transition) else message.subject_ref


def describe_facts(message: Message) -> list[str | tuple[str, str]]:
    """Describe the content of a message: the states of a transition, or the fields in short."""
    if isinstance(message, Transition):
        is_about_store = message.event == ServerEvent.STORE_UNAVAILABLE
        trouble = getattr(message.facts, "trouble", None) if is_about_store else None
        kind = f" ({trouble})" if trouble else ""
        reason = f": {message.reason}" if message.reason else ""
        return [(f"{message.source or '•'} → {message.target}", "bold"), f" on {message.event}{kind}{reason}"]
    fields = [(name, short_text(getattr(message, name))) for name in type(message).model_fields]
    return [" ".join(f"{name}={text}" for name, text in fields if text and name not in HIDDEN_FIELDS)]


@singledispatch
def short_text(value: object) -> str:
    """Return a value as a short text; an empty one for an empty value."""
    return "" if value in (None, "", False, ()) else str(value)


@short_text.register
def _(value: float) -> str:
    """Format a number without an exponent."""
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
    rounds = f"{value.total_rounds}-rounds" if value.total_rounds else "rounds-of-the-app"
    return f"{rounds},quorum-{value.quorum}"


@short_text.register
def _(value: RunOverrides) -> str:
    fields = value.model_dump(include=set(RunOverrides.model_fields), exclude_defaults=True)
    return ",".join(f"{name}-{one}" for name, one in fields.items() if name != "config") or "none"


@short_text.register
def _(value: RoundResult) -> str:
    metrics = {
        "loss": value.loss,
        "accuracy": value.accuracy,
        "s": value.seconds,
        "clients": len(value.participants),
        "late": value.late_merged or None,
        "dropped": value.late_dropped or None,
    }
    return ",".join(f"{name}:{short_text(one)}" for name, one in metrics.items() if one is not None)


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
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    return ",".join(
        f"{name}:{short_text(one) or one}"
        for name, one in fields.items()
        if one is not None and one not in ("", ())
    )
