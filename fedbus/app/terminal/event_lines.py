"""A message as one line: when, which word, who, about what, and the facts in short."""

from datetime import datetime
from functools import singledispatch
from typing import Any, Final

from pydantic import BaseModel
from rich.text import Text

from fedbus.app.terminal.output import printable, size
from fedbus.bus.bus import Seen
from fedbus.contracts.message import Message
from fedbus.contracts.model import Artifact, BlobRef, ModelRef
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan
from fedbus.contracts.server import Content, ServerEvent
from fedbus.contracts.serving import Finding, Sketch
from fedbus.contracts.transition import Transition

SAID_ELSEWHERE: Final = {"task", "run", "round", "client", "message_id", "reply_to", "created_at"}
"""Fields that the line shows in another place, or that only programs need."""
SMALLEST: Final = 0.001
WHOLE: Final = 1000
"""From here on a number is told without its fraction."""
COLUMNS: Final = (20, 28, 14)
"""For the word, who said it, and about what."""
WIDE: Final = 110
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


def line(seen: Seen, *, width: int = WIDE) -> Text:
    """*seen* for a person; in columns where *width* has room for them."""
    message, envelope = seen.message, seen.envelope
    bad = any(word in message.word for word in ("fail", "refused", "lost", "declined"))
    columns = COLUMNS if width >= WIDE else (0, 0, 0)
    said, by, of = (f"{text:<{column}} " for text, column in zip(_begin(seen), columns, strict=True))
    told = Text.assemble(
        (f"{clock(envelope.time)}  ", "dim"),
        (said, "red" if bad else COLOURS.get(str(message.family), "")),
        (by, "bold"),
        of,
        *facts(message),
    )
    told.plain = printable(told.plain)
    return told


def _begin(seen: Seen) -> tuple[str, str, str]:
    return word_of(seen.message), who(seen.envelope.source), about(seen.message)


def record(seen: Seen) -> dict[str, Any]:
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


def clock(time: datetime) -> str:
    return time.astimezone().strftime("%H:%M:%S.") + f"{time.microsecond // 1000:03d}"


def word_of(message: Message) -> str:
    return message.facts.kind if isinstance(message, Transition) else message.word


def who(source: str) -> str:
    """The agent, and whose it is: ``flower-client c1``."""
    agent, _, owner = source.removeprefix("fedbus/").partition("/")[2].partition("/")
    return f"{agent} {owner}" if owner != "server" else agent


def about(message: Message) -> str:
    return message.thing if isinstance(message, Transition) else message.about


def facts(message: Message) -> list[str | tuple[str, str]]:
    """What a message says beyond its word: the move of a lifecycle, or its fields in short."""
    if isinstance(message, Transition):
        is_about_the_store = message.event == ServerEvent.STORE_UNAVAILABLE
        trouble = getattr(message.facts, "trouble", None) if is_about_the_store else None
        kind = f" ({trouble})" if trouble else ""
        reason = f": {message.reason}" if message.reason else ""
        return [(f"{message.source or '•'} → {message.target}", "bold"), f" on {message.event}{kind}{reason}"]
    said = [(name, short(getattr(message, name))) for name in type(message).model_fields]
    return [" ".join(f"{name}={text}" for name, text in said if text and name not in SAID_ELSEWHERE)]


@singledispatch
def short(value: object) -> str:
    """A value in a word or two; nothing for what is empty."""
    return "" if value in (None, "", False, ()) else str(value)


@short.register
def _(value: float) -> str:
    """Without an exponent: a line is read by people; programs have `record`."""
    if 0 < abs(value) < SMALLEST:
        return f"<{SMALLEST}" if value > 0 else f">-{SMALLEST}"
    return f"{value:.0f}" if abs(value) >= WHOLE else f"{value:.4g}"


@short.register
def _(value: datetime) -> str:
    return clock(value)


@short.register
def _(value: tuple) -> str:  # type: ignore[type-arg]
    return ",".join(short(item) or str(item) for item in value)


@short.register
def _(value: dict) -> str:  # type: ignore[type-arg]
    return ",".join(name if item is True else f"{name}:{short(item)}" for name, item in value.items())


@short.register
def _(value: BlobRef) -> str:
    return f"{value.sha256[:8]}({size(value.size_bytes)})"


@short.register
def _(value: Artifact) -> str:
    return f"{value.sha256[:8]}({size(value.size_bytes)})"


@short.register
def _(value: ModelRef) -> str:
    return f"v{value.version}:{value.sha256[:8]}"


@short.register
def _(value: RunPlan) -> str:
    return f"{value.rounds}-rounds,quorum-{value.quorum}"


@short.register
def _(value: RunOverrides) -> str:
    given = value.model_dump(include=set(RunOverrides.model_fields), exclude_defaults=True)
    return ",".join(f"{name}-{one}" for name, one in given.items() if name != "config") or "none"


@short.register
def _(value: RoundResult) -> str:
    metrics = {
        "loss": value.loss,
        "accuracy": value.accuracy,
        "s": value.seconds,
        "clients": len(value.participants),
    }
    return ",".join(f"{name}:{short(figure)}" for name, figure in metrics.items() if figure is not None)


@short.register
def _(value: Content) -> str:
    return short(value.blob) if value.blob else f"({size(len(value.inline or b''))})"


@short.register
def _(value: Finding) -> str:
    return f"{value.check}:ok" if value.ok else f"{value.check}:{value.value:.2g}"


@short.register
def _(value: Sketch) -> str:
    return f"{value.feature}:{short(value.psi)}"


@short.register
def _(value: BaseModel) -> str:
    said = {name: getattr(value, name) for name in type(value).model_fields}
    return ",".join(
        f"{name}:{short(one) or one}" for name, one in said.items() if one is not None and one not in ("", ())
    )
