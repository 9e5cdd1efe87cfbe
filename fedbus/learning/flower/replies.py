"""Pending messages, and their replies on the way from the event loop to the app's threads.

The replies to a `send_and_receive` are yielded in order of arrival. Plain iteration keeps them, like the list
that Flower returns. `Replies.drain` yields each once and releases it, so that an aggregation holds only a few
in memory.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, overload

from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from opentelemetry.trace import SpanContext

from fedbus.contracts.client import RoundReply
from fedbus.learning.bus_protocol import OfferProtocol
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.private_api import (
    SERVER_NODE_ID,
    UNKNOWN_ERROR,
    RunNotRunningException,
    build_message,
)
from fedbus.learning.round_tracker import SentMessage

MAX_PREFETCHED_REPLIES: Final = 3
"""The limit of replies with arrays that are fetched before the app takes them."""


class GridClosed(RuntimeError, RunNotRunningException):
    """The run has ended for this Grid. The text is the reason.

    Flower's background threads end on RunNotRunningException.
    """


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
    """A message that waits for its reply: the tracker's view, Flower's message, and its reply queue."""

    sent: SentMessage
    message: Message
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
    """A reply with its encoded records in memory, or with an error."""

    pending: PendingMessage
    reply: RoundReply | None = None
    data: bytes | memoryview | None = None
    error: Error | None = None
    holds_slot: bool = False
    """Whether it occupies one of the `ReplyQueue.slots` until the app takes it."""


class ReplyQueue:
    """A queue of the replies to one call, from the event loop to the thread that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: SimpleQueue[FetchedReply | GridClosed] = SimpleQueue()
        self.slots = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

    def put(self, entry: FetchedReply | GridClosed) -> None:
        self._queue.put(entry)

    def get(self) -> FetchedReply:
        """Wait for the next reply, in the app's thread. Raises GridClosed."""
        entry = self._queue.get()
        if isinstance(entry, GridClosed):
            self._queue.put(entry)  # for other threads that wait
            raise entry
        if entry.holds_slot:
            self._loop.call_soon_threadsafe(self.slots.release)
        return entry


class Replies(Sequence[Message]):
    """The replies to one `send_and_receive`, in order of arrival, as the list that Flower expects."""

    def __init__(self, count: int, take: Callable[[], Message]) -> None:
        self._missing = count
        self._count = count
        self._take = take
        self._cached: list[Message] = []
        self._drained = False

    def __bool__(self) -> bool:
        return self._count > 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        self._check_not_drained()
        for index in range(self._count):
            self._cache_until(index + 1)
            yield self._cached[index]

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        self._check_not_drained()
        self._cache_until(self._count)
        return self._cached[index]

    def drain(self) -> Iterator[Message]:
        """Yield each reply once, without keeping it. Raises RuntimeError on a second call."""
        self._check_not_drained()
        self._drained = True
        while self._cached:
            yield self._cached.pop(0)
        while self._missing:
            self._missing -= 1
            yield self._take()

    def _cache_until(self, count: int) -> None:
        while len(self._cached) < count:
            self._cached.append(self._take())
            self._missing -= 1

    def _check_not_drained(self) -> None:
        if self._drained:
            raise RuntimeError(
                "streaming aggregation has released the replies of this round. "
                'Set aggregation = "stock" in [tool.fedbus] for a strategy that reads them again'
            )


def round_number_of(message: Message) -> int | None:
    """Return the round of *message*: Flower's group id if it is a number, else "server-round" of a ConfigRecord."""
    if message.metadata.group_id.isdecimal():
        return int(message.metadata.group_id)
    for record in message.content.values():
        if isinstance(record, ConfigRecord):
            number = record.get("server-round")
            if isinstance(number, int):
                return number
    return None


def sample_count(content: RecordDict) -> int:
    """Return the sample count ("num-examples") that the client reports; 0 if it reports none."""
    for record in content.metric_records.values():
        for key in ("num-examples", "num_examples"):
            value = record.get(key)
            if isinstance(value, int | float):
                return int(value)
    return 0


def update_weight(content: RecordDict, weighted_by: str) -> float | None:
    """Return the metric *weighted_by* of the first MetricRecord; None if it is missing or not a number."""
    metrics = next(iter(content.metric_records.values()), None)
    weight = None if metrics is None else metrics.get(weighted_by)
    return float(weight) if isinstance(weight, int | float) else None  # an int would wrap int8 arrays


def has_blob(reply: RoundReply) -> bool:
    return reply.content is not None and reply.content.blob is not None


def make_fetched_reply(pending: PendingMessage, reply: RoundReply | Error) -> FetchedReply:
    """Return a reply that has no blob to download."""
    if isinstance(reply, Error):
        return FetchedReply(pending, error=reply)
    if reply.error_code is not None:
        return FetchedReply(pending, reply=reply, error=Error(reply.error_code, reply.error_reason))
    inline = reply.content.inline if reply.content else None
    return FetchedReply(pending, reply=reply, data=inline)


def decode_reply(fetched: FetchedReply, run_id: int) -> Message:
    """Decode *fetched* to a Flower message; an undecodable reply becomes an error message of its client."""
    metadata = _reply_metadata(fetched, run_id)
    if fetched.error:
        return build_message(metadata, error=fetched.error)
    try:
        content = record_codec.decode(fetched.data or b"")
    except record_codec.RecordDecodeError as error:
        reason = f"{fetched.pending.sent.client}: invalid reply: {error}"
        return build_message(metadata, error=Error(UNKNOWN_ERROR, reason))
    return build_message(metadata, content=content)


def _reply_metadata(fetched: FetchedReply, run_id: int) -> Metadata:
    request, reply = fetched.pending.message.metadata, fetched.reply
    return Metadata(
        run_id=run_id,
        message_id=reply.message_id if reply else "",
        src_node_id=request.dst_node_id,
        dst_node_id=SERVER_NODE_ID,
        reply_to_message_id=request.message_id,
        group_id=request.group_id,
        created_at=reply.created_at if reply else time.time(),
        ttl=reply.ttl_s if reply else request.ttl,
        message_type=request.message_type,
    )
