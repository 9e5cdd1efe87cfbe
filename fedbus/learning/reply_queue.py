"""Pending messages, and their replies on the way from the event loop to the thread that takes them."""

import asyncio
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from opentelemetry.trace import SpanContext

from fedbus.contracts.client import RoundReply
from fedbus.learning.bus_protocol import OfferProtocol
from fedbus.learning.library import MessengerClosed, OutgoingMessage, ReplyError
from fedbus.learning.round_tracker import SentMessage

MAX_PREFETCHED_REPLIES: Final = 3
"""The limit of replies with blobs that are fetched before they are taken."""


@dataclass
class OfferLease:
    """The reference count of the replies to one offered blob; the offer is released at zero."""

    pending_replies: int
    offer: OfferProtocol | None = None

    def release_one(self) -> None:
        self.pending_replies -= 1
        if not self.pending_replies and self.offer:
            self.offer.release()


@dataclass(frozen=True)
class PendingMessage:
    """A message that waits for its reply: the tracker's view, the library's message, and its reply queue."""

    sent: SentMessage
    message: OutgoingMessage
    round: int
    lease: OfferLease
    queue: "ReplyQueue | None"
    reply_span: SpanContext | None = None
    """The span in which the reply was sent; None before it arrives."""
    answered_at: float = 0.0
    """The arrival of the reply, in seconds of the loop's clock."""
    reply_message_id: str = ""
    """The id of the bus message with the reply."""


@dataclass(frozen=True)
class FetchedReply:
    """A reply with its bytes in memory, or with an error."""

    pending: PendingMessage
    reply: RoundReply | None = None
    data: bytes | memoryview | None = None
    error: ReplyError | None = None
    holds_slot: bool = False
    """Whether it occupies one of the `ReplyQueue.slots` until it is taken."""


class ReplyQueue:
    """A queue of the replies to one call, from the event loop to the thread that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: SimpleQueue[FetchedReply | MessengerClosed] = SimpleQueue()
        self.slots = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

    def put(self, entry: FetchedReply | MessengerClosed) -> None:
        self._queue.put(entry)

    def get(self) -> FetchedReply:
        """Wait for the next reply, in a thread that is not the event loop's. Raises MessengerClosed."""
        entry = self._queue.get()
        if isinstance(entry, MessengerClosed):
            self._queue.put(entry)  # for other threads that wait
            raise entry
        if entry.holds_slot:
            self._loop.call_soon_threadsafe(self.slots.release)
        return entry


def has_blob(reply: RoundReply) -> bool:
    return reply.content is not None and reply.content.blob is not None


def make_fetched_reply(pending: PendingMessage, reply: RoundReply | ReplyError) -> FetchedReply:
    """Return a reply that has no blob to download."""
    if isinstance(reply, ReplyError):
        return FetchedReply(pending, error=reply)
    if reply.error_code is not None:
        return FetchedReply(pending, reply=reply, error=ReplyError(reply.error_code, reply.error_reason))
    inline = reply.content.inline if reply.content else None
    return FetchedReply(pending, reply=reply, data=inline)
