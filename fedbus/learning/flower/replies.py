"""Messages that wait for their answers, and the answers on their way from the loop to the app's threads.

The replies to a `send_and_receive` are yielded as they come. Iterated plainly they are kept, as
Flower's own list would be; `Replies.drain` hands each out once and forgets it, so that whoever
adds them up holds a few at a time.
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
"""How many replies with arrays are fetched ahead of the app that takes them."""


class GridClosed(RuntimeError, RunNotRunningException):
    """The run is over for this Grid; the text says why."""


@dataclass
class OfferLease:
    """What was paid for messages of one content: the offer ends with the last answer."""

    owed: int
    offer: OfferProtocol | None = None

    def answered(self) -> None:
        self.owed -= 1
        if not self.owed and self.offer:
            self.offer.release()


@dataclass(frozen=True)
class PendingMessage:
    """A message that waits for its answer, as the Grid sees it."""

    sent: SentMessage
    message: Message
    round: int
    postage: OfferLease
    exchange: "ReplyQueue | None"
    came_from: SpanContext | None = None
    """Where its answer was sent, once it is here."""
    answered_at: float = 0.0
    """When that was, by the loop's clock."""
    said_in: str = ""
    """The id of the message that it came in."""


@dataclass(frozen=True)
class FetchedReply:
    """An answer on its way to the app: bytes, or an error."""

    pending: PendingMessage
    reply: RoundReply | None = None
    data: bytes | memoryview | None = None
    error: Error | None = None
    holds_slot: bool = False


class ReplyQueue:
    """The answers to the messages of one call, from the loop to the thread that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: SimpleQueue[FetchedReply | GridClosed] = SimpleQueue()
        self.slots = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

    def put(self, arrival: FetchedReply | GridClosed) -> None:
        self._arrived.put(arrival)

    def take(self) -> FetchedReply:
        arrival = self._arrived.get()
        if isinstance(arrival, GridClosed):
            self._arrived.put(arrival)  # for whoever else waits here
            raise arrival
        if arrival.holds_slot:
            self._loop.call_soon_threadsafe(self.slots.release)
        return arrival


class Replies(Sequence[Message]):
    """The replies to one `send_and_receive`, as they come. To Flower it is the list that it expects."""

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
        at = 0
        while at < self._count:
            self._cache_until(at + 1)
            yield self._cached[at]
            at += 1

    @overload
    def __getitem__(self, at: int) -> Message: ...
    @overload
    def __getitem__(self, at: slice) -> list[Message]: ...
    def __getitem__(self, at: int | slice) -> Message | list[Message]:
        self._check_not_drained()
        self._cache_until(self._count)
        return self._cached[at]

    def drain(self) -> Iterator[Message]:
        """Each reply once; nothing of it stays here."""
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
                "the replies of this round were added up as they came and are gone: "
                'set aggregation = "stock" in [tool.fedbus] for a strategy that reads them again'
            )


def round_number_of(message: Message) -> int | None:
    """The round of *message*: Flower's group, where it is a number, else what strategies write into the config."""
    if message.metadata.group_id.isdecimal():
        return int(message.metadata.group_id)
    for record in message.content.values():
        if isinstance(record, ConfigRecord):
            number = record.get("server-round")
            if isinstance(number, int):
                return number
    return None


def sample_count(content: RecordDict) -> int:
    """How many samples the client says it trained on; 0 where it does not say."""
    for record in content.metric_records.values():
        for key in ("num-examples", "num_examples"):
            value = record.get(key)
            if isinstance(value, int | float):
                return int(value)
    return 0


def has_blob(reply: RoundReply) -> bool:
    return reply.content is not None and reply.content.blob is not None


def make_fetched_reply(pending: PendingMessage, answer: RoundReply | Error) -> FetchedReply:
    """An answer that needs no fetching."""
    if isinstance(answer, Error):
        return FetchedReply(pending, error=answer)
    if answer.error_code is not None:
        return FetchedReply(pending, reply=answer, error=Error(answer.error_code, answer.error_reason))
    inline = answer.content.inline if answer.content else None
    return FetchedReply(pending, reply=answer, data=inline)


def decode_reply(arrival: FetchedReply, run_id: int) -> Message:
    """The Flower message of *arrival*; what cannot be read is an error of the client that sent it."""
    metadata = _reply_metadata(arrival, run_id)
    if arrival.error:
        return build_message(metadata, error=arrival.error)
    try:
        content = record_codec.decode(arrival.data or b"")
    except record_codec.RecordDecodeError as error:
        reason = f"{arrival.pending.sent.client}: its reply cannot be read: {error}"
        return build_message(metadata, error=Error(UNKNOWN_ERROR, reason))
    return build_message(metadata, content=content)


def _reply_metadata(arrival: FetchedReply, run_id: int) -> Metadata:
    asked, reply = arrival.pending.message.metadata, arrival.reply
    return Metadata(
        run_id=run_id,
        message_id=reply.message_id if reply else "",
        src_node_id=asked.dst_node_id,
        dst_node_id=SERVER_NODE_ID,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=reply.created_at if reply else time.time(),
        ttl=reply.ttl_s if reply else asked.ttl,
        message_type=asked.message_type,
    )
