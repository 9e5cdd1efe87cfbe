"""The envelope of a message: CloudEvents 1.0, NATS binding, binary mode. The body is msgpack.

The attributes are ``ce-…`` headers and the trace context is in ``traceparent``, so that
``nats sub --headers-only`` shows a readable log. Sources:
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/nats-protocol-binding.md
and RFC 9562 for the time-ordered message ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID

import msgpack
from pydantic import ValidationError

from fedbus.common import clock
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import BY_TYPE
from fedbus.contracts.causation import current_cause
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, ClientMessage, Family, Message, Request, type_name
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.transition import Transition

SPEC_VERSION: Final = "1.0"
CONTENT_TYPE: Final = "application/vnd.msgpack"
MAX_EVENT_BYTES: Final = 1024 * 1024
"""A transition of a run or its server names all clients of the cohort: about 25 bytes for each, with its samples."""
TRACE_HEADERS: Final = ("traceparent", "tracestate")
MAX_ID_CHARS: Final = 256
"""Limit for a received id: messages that it causes carry it in ``ce-causationid``."""
CAUSATION_HEADER: Final = "ce-causationid"
"""A CloudEvents extension attribute. The name is common among event stores."""

BodyT = TypeVar("BodyT", bound=Body)


class DecodeError(ValueError):
    """Received data is not a valid fedbus message. The text is for the sender and for the dead letter."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """The metadata of a message."""

    id: str
    type: str
    source: str
    subject: str
    time: datetime
    trace: Mapping[str, str] = field(default_factory=dict)
    cause: str = ""
    """The id of the message that caused this one; empty if there is none. See `fedbus.contracts.causation`."""

    def headers(self) -> dict[str, str]:
        return {
            "ce-specversion": SPEC_VERSION,
            "ce-id": self.id,
            "ce-type": self.type,
            "ce-source": self.source,
            "ce-subject": self.subject,
            "ce-time": self.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "ce-datacontenttype": CONTENT_TYPE,
            "Nats-Msg-Id": self.id,
            **({CAUSATION_HEADER: self.cause} if self.cause else {}),
            **self.trace,
        }


def make_envelope(
    message: Message,
    *,
    source: str,
    id: str | None = None,
    trace: Mapping[str, str] | None = None,
    cause: str = "",
) -> Envelope:
    """Create the envelope of *message*. Its cause is the message that is being handled, else *cause*.

    With a deterministic *id*, the stream drops repeated publishes.
    """
    return Envelope(
        id=id or uuid7(),
        type=type_name(type(message)),
        source=source,
        subject=message.subject_ref,
        time=clock.now(),
        trace=dict(trace or {}),
        cause=current_cause() or cause,
    )


def pack(body: Body) -> bytes:
    """Encode *body* as msgpack.

    Raises:
        ValueError: The result has more than `MAX_EVENT_BYTES`, or an integer has more than 64 bits.

    """
    try:
        packed: bytes = msgpack.packb(body.model_dump(mode="python"), datetime=True)
    except OverflowError:
        raise ValueError(f"{type(body).__name__} contains an integer of more than 64 bits") from None
    if len(packed) > MAX_EVENT_BYTES:
        raise ValueError(
            f"{type(body).__name__} has {len(packed)} bytes (limit {MAX_EVENT_BYTES}): "
            "send large content as a blob"
        )
    return packed


def unpack(data: bytes) -> Any:
    """Decode the msgpack in *data* to plain values; raises DecodeError."""
    if len(data) > MAX_EVENT_BYTES:
        raise DecodeError(f"the body has {len(data)} bytes (limit {MAX_EVENT_BYTES})")
    try:
        return msgpack.unpackb(data, timestamp=3, strict_map_key=True)
    except (ValueError, OverflowError, msgpack.UnpackException) as error:  # overflow: a time beyond year 9999
        raise DecodeError(f"the body is not valid msgpack: {error or type(error).__name__}") from None


def decode_message(subject: str, headers: Mapping[str, str] | None, data: bytes) -> tuple[Envelope, Message]:
    """Decode the message that arrived on *subject*; raises DecodeError."""
    envelope = _parse_headers(headers or {})
    kind = BY_TYPE.get(envelope.type)
    if kind is None:
        raise DecodeError(f"this version of fedbus does not know the message type {envelope.type!r}")
    message = decode_body(kind, data)
    _check_identity(subject, envelope, message)
    return envelope, message


def decode_body(kind: type[BodyT], data: bytes) -> BodyT:
    """Decode a body of type *kind*; raises DecodeError, which names the first invalid field."""
    try:
        return kind.model_validate(unpack(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise DecodeError(f"{kind.__name__}: {where}: {first['msg']}") from None


def _parse_headers(headers: Mapping[str, str]) -> Envelope:
    try:
        if headers["ce-specversion"] != SPEC_VERSION:
            raise DecodeError(
                f"CloudEvents version {headers['ce-specversion']} is not supported (expected {SPEC_VERSION})"
            )
        if headers["ce-datacontenttype"] != CONTENT_TYPE:
            raise DecodeError(
                f"content type {headers['ce-datacontenttype']!r} is not supported (expected {CONTENT_TYPE})"
            )
        if len(headers["ce-id"]) > MAX_ID_CHARS:
            raise DecodeError(f"the message id has {len(headers['ce-id'])} characters (limit {MAX_ID_CHARS})")
        return Envelope(
            id=headers["ce-id"],
            type=headers["ce-type"],
            source=headers["ce-source"],
            subject=headers.get("ce-subject", ""),
            time=_parse_time(headers["ce-time"]),
            trace={name: headers[name] for name in TRACE_HEADERS if name in headers},
            cause=headers.get(CAUSATION_HEADER, ""),
        )
    except KeyError as missing:
        raise DecodeError(f"header {missing.args[0]} is missing: this is not a fedbus message") from None
    except ValueError as error:
        raise DecodeError(str(error)) from None


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise DecodeError(f"the time {text!r} has no time zone")
    return time


def _check_identity(subject: str, envelope: Envelope, message: Message) -> None:
    """Check body and source against the subject, the only part of a message that nats-server authorises."""
    try:
        expected, owner = (
            _expected_subject(subjects.federation_in(subject), message),
            subjects.client_in(subject),
        )
    except subjects.InvalidSubject as error:
        raise DecodeError(str(error)) from None
    if isinstance(message, ClientMessage) and owner is not None and message.client != owner:
        raise DecodeError(
            f"forged: the subject is of client {owner}, but the body is of client {message.client}"
        )
    if subject != expected:
        raise DecodeError(f"forged: a message for {expected} was published on {subject}")
    if (sender := _expected_sender(message)) not in (None, envelope.source.rpartition("/")[2]):
        raise DecodeError(f"forged: only {sender} may publish this, but the source is {envelope.source}")


def _expected_subject(fed: FederationId, message: Message) -> str:
    """Return the subject that *message* must arrive on."""
    if isinstance(message, Transition):
        return subjects.lifecycle(fed, message.kind, message.key)
    return subjects.subject_for(fed, message)


def _expected_sender(message: Message) -> str | None:
    """Return the owner that may publish *message*: a client or the server side; None if any sender may."""
    match message:
        case Transition():
            return getattr(message.facts, "client", SERVER_SIDE)
        case Request():
            return None
        case ClientMessage() if message.family is not Family.CMD:
            return message.client
        case _:
            return SERVER_SIDE


def uuid7() -> str:
    """Return a new UUID of version 7: milliseconds since the epoch, then random bits (RFC 9562, section 5.7)."""
    value = (clock.time_ns() // 1_000_000 << 80) | clock.random_bits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


def id_timestamp(id: str) -> datetime | None:
    """Return the creation time in a message *id* that is a UUID of version 7; None for any other id."""
    try:
        value = UUID(id)
        if value.version == 7:
            return datetime.fromtimestamp((value.int >> 80) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None
