"""The messages of the training library to its clients, as they are on the wire."""

from typing import ClassVar

from pydantic import Field

from fedbus.contracts.identifiers import Id
from fedbus.contracts.message import Body, ClientMessage, Family
from fedbus.contracts.model import MAX_INLINE_BYTES, BlobRef


class MessageContent(Body):
    """The bytes of a message of the training library. They are inline if they are few, otherwise a blob."""

    inline: bytes | None = Field(default=None, max_length=MAX_INLINE_BYTES)
    blob: BlobRef | None = None


def is_training(message_type: str) -> bool:
    """Return whether messages of this type train: ``train``, or with a suffix of the app, ``train.distill``."""
    return message_type.partition(".")[0] == "train"


class RoundMessage(ClientMessage):
    """A message of the training library to one client: train, evaluate or query."""

    name: ClassVar[str] = "round_message"
    family: ClassVar[Family] = Family.CMD

    run: Id
    message_id: str
    message_type: str
    round: int | None = None
    """The round that the message counts for, if it has one."""
    group_id: str = ""
    created_at: float
    """Seconds since the epoch."""
    ttl_s: float
    """The time to live of the message, from *created_at*."""
    content: MessageContent
