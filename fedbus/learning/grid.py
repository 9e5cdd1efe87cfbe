"""Flower's Grid over the bus: what a ServerApp pushes and pulls, as events and blobs.

Flower's Grid is synchronous and is called by the ServerApp's threads; the bus lives on an
asyncio loop in another thread. So there are two sides, and each keeps to itself:

- on the loop: `RoundBook` says who is there and who owes what; messages are published, replies
  are handed in (`deliver`), blobs of replies are fetched, at most `FETCHES` ahead of the app;
- in the app's threads: records are encoded, hashed and decoded, and every call waits.

The replies of a `send_and_receive` are yielded as they come. Iterated plainly they are kept, as
Flower's own list would be; `Replies.drain` hands each out once and forgets it, so that whoever
adds them up holds a few at a time.

Nobody waits for ever: a message has a deadline, a node that goes takes its debts with it, and
`close` ends every call with GridClosed.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Final, TypeVar, overload

import structlog
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext

from fedbus.contracts.causation import handled, handles
from fedbus.contracts.client import RoundReply
from fedbus.contracts.envelope import uuid7
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import Content, RoundMessage
from fedbus.learning import records
from fedbus.learning.content import Parcel, received
from fedbus.learning.flower_internals import (
    NO_REPLY,
    NODE_UNAVAILABLE,
    SERVER_NODE_ID,
    UNKNOWN_ERROR,
    Run,
    RunNotRunningException,
    empty_run,
    message_of,
    stamp,
)
from fedbus.learning.nodes import node_id, run_number
from fedbus.learning.ports import Bus, Offer
from fedbus.learning.round_book import (
    Answered,
    Effect,
    Event,
    Gone,
    NodesChanged,
    RoundBook,
    Sent,
    Unanswered,
)
from fedbus.learning.time_split import Answered as Exchanged

FETCHES: Final = 3
"""How many replies with arrays are fetched ahead of the app that takes them."""
PUBLISHES: Final = 64
"""How many messages are on their way into the stream at a time."""
ASKED_AGAIN_S: Final = (0.5, 3.0)
"""Who asks for the nodes again after such a pause, and sends nothing in between, waits for more of them."""
LONGEST_BLOCK_S: Final = 2.0
"""How long such a caller is held at a time: it may have reasons of its own to look elsewhere."""

log = structlog.get_logger("fedbus.learning")
tracer = trace.get_tracer("fedbus.learning")
T = TypeVar("T")


class GridClosed(RuntimeError, RunNotRunningException):
    """The run is over for this Grid; the text says why."""


class NotEnoughClients(RuntimeError):
    """The strategy waits for more clients than there are, and has waited long enough."""

    def __init__(self, present: Iterable[str], failed: dict[str, str], waited_s: float) -> None:
        there = ", ".join(sorted(present)) or "nobody"
        gone = "".join(f"; {client} is out ({reason})" for client, reason in sorted(failed.items()))
        super().__init__(
            f"the strategy waited {waited_s:g} s for more clients: there: {there}{gone}. "
            "Lower the strategy's min_available_nodes, or start more clients"
        )


@dataclass(frozen=True)
class Tally:
    """Who took part in a round."""

    participants: dict[str, int] = field(default_factory=dict)
    """Samples by client."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons by client."""
    train_s: dict[str, float] = field(default_factory=dict)
    """How long the training took each client."""
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each ClientApp said of itself, by client."""
    answers: list[Exchanged] = field(default_factory=list)
    """When each client was asked and answered; not those that failed."""


@dataclass
class _Postage:
    """What was paid for messages of one content: the offer ends with the last answer."""

    owed: int
    offer: Offer | None = None

    def answered(self) -> None:
        self.owed -= 1
        if not self.owed and self.offer:
            self.offer.release()


@dataclass(frozen=True)
class _Pending:
    """A message that waits for its answer, as the Grid sees it."""

    sent: Sent
    message: Message
    round: int
    postage: _Postage
    exchange: "_Exchange | None"
    came_from: SpanContext | None = None
    """Where its answer was sent, once it is here."""
    answered_at: float = 0.0
    """When that was, by the loop's clock."""
    said_in: str = ""
    """The id of the message that it came in."""


@dataclass(frozen=True)
class _Arrival:
    """An answer on its way to the app: bytes, or an error."""

    pending: _Pending
    reply: RoundReply | None = None
    data: bytes | memoryview | None = None
    error: Error | None = None
    holds_slot: bool = False


class _Exchange:
    """The answers to the messages of one call, from the loop to the thread that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: SimpleQueue[_Arrival | GridClosed] = SimpleQueue()
        self.slots = asyncio.Semaphore(FETCHES)

    def put(self, arrival: _Arrival | GridClosed) -> None:
        self._arrived.put(arrival)

    def take(self) -> _Arrival:
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
        self._kept: list[Message] = []
        self._drained = False

    def __bool__(self) -> bool:
        return self._count > 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        self._must_be_whole()
        at = 0
        while at < self._count:
            self._keep(at + 1)
            yield self._kept[at]
            at += 1

    @overload
    def __getitem__(self, at: int) -> Message: ...
    @overload
    def __getitem__(self, at: slice) -> list[Message]: ...
    def __getitem__(self, at: int | slice) -> Message | list[Message]:
        self._must_be_whole()
        self._keep(self._count)
        return self._kept[at]

    def drain(self) -> Iterator[Message]:
        """Each reply once; nothing of it stays here."""
        self._must_be_whole()
        self._drained = True
        while self._kept:
            yield self._kept.pop(0)
        while self._missing:
            self._missing -= 1
            yield self._take()

    def _keep(self, count: int) -> None:
        while len(self._kept) < count:
            self._kept.append(self._take())
            self._missing -= 1

    def _must_be_whole(self) -> None:
        if self._drained:
            raise RuntimeError(
                "the replies of this round were added up as they came and are gone: "
                'set aggregation = "stock" in [tool.fedbus] for a strategy that reads them again'
            )


class BusGrid(Grid):
    """The Grid of one run. Made on the loop that the bus lives on."""

    def __init__(self, bus: Bus, *, task: str, run: str, plan: RunPlan, lost_after_s: float = 10.0) -> None:
        self._bus = bus
        self._task = task
        self._run_name = run
        self._run = empty_run(run_number(run))
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        # on the loop
        self._book = RoundBook(run, lost_after_s=lost_after_s)
        self._pending: dict[str, _Pending] = {}
        self._unclaimed: dict[str, tuple[_Pending, RoundReply | Error]] = {}
        self._publishes = asyncio.Semaphore(PUBLISHES)
        self._fetching: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        # between the threads, under the condition
        self._changed = threading.Condition()
        self._nodes: dict[int, str] = {}
        self._failed: dict[str, str] = {}
        self._calls_made = 0
        """Whoever has sent or pulled something was not merely waiting for nodes."""
        self._closed: GridClosed | None = None
        self._calls: set[Future[Any]] = set()
        self._asker = threading.local()
        self._latest_round = 0
        self._came_from: SpanContext | None = None
        """Of the event that is being handled."""
        self._said_in = ""
        """Its id."""
        self._tallies: dict[int, Tally] = defaultdict(Tally)

    # --- on the loop ------------------------------------------------------------------------

    def admit(self, clients: Iterable[str]) -> None:
        """These have joined, as somebody else heard."""
        self._apply(self._book.admit(clients, self._now()))

    def deliver(self, event: Event, *, came_from: SpanContext | None = None, said_in: str = "") -> None:
        """An event from a client, the span it was sent in, and the message's id.

        Foreign runs, late and repeated answers are dropped.
        """
        self._came_from, self._said_in = came_from, said_in
        self._apply(self._book.handle(event, self._now()))
        self._came_from, self._said_in = None, ""

    def close(self, reason: str) -> None:
        """End every call, now and later, with GridClosed."""
        closed = GridClosed(reason)
        with self._changed:
            self._closed = self._closed or closed
            calls = list(self._calls)
            self._changed.notify_all()
        for call in calls:
            call.cancel()
        for task in self._fetching:
            task.cancel()
        if self._alarm:
            self._alarm.cancel()
        for pending in self._pending.values():
            pending.postage.answered()
            if pending.exchange:
                pending.exchange.put(closed)
        self._pending.clear()

    def _now(self) -> float:
        return self._loop.time()

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Answered(sent=sent, reply=reply):
                    self._answered(sent, reply)
                case Unanswered(sent=sent, gone=gone, reason=reason):
                    code = NODE_UNAVAILABLE if gone is Gone.NODE else NO_REPLY
                    self._answered(sent, Error(code, f"{sent.client}: {reason}"))
                case NodesChanged():
                    self._show_nodes()
        self._set_alarm()

    def _show_nodes(self) -> None:
        with self._changed:
            self._nodes = {node_id(client): client for client in self._book.nodes}
            self._failed = self._book.failed
            self._changed.notify_all()

    def _set_alarm(self) -> None:
        """Wake up when the book will have something to say; an alarm that is early enough stays."""
        wake = self._book.next_wake()
        if wake is None or self._closed or (self._alarm and self._alarm.when() <= wake):
            return
        if self._alarm:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(wake, self._time_passed)

    def _time_passed(self) -> None:
        self._alarm = None
        self._apply(self._book.passed(self._now(), connected=self._bus.connected))

    def _answered(self, sent: Sent, answer: RoundReply | Error) -> None:
        pending = self._pending.pop(sent.message_id, None)
        if pending is None:
            return
        pending.postage.answered()
        pending = replace(pending, came_from=self._came_from, said_in=self._said_in, answered_at=self._now())
        if pending.exchange is None:
            self._unclaimed[sent.message_id] = pending, answer
        elif isinstance(answer, Error) or not _has_blob(answer):
            pending.exchange.put(_arrival(pending, answer))
        else:
            task = self._loop.create_task(self._fetch_for(pending.exchange, pending, answer))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    async def _fetch_for(self, exchange: _Exchange, pending: _Pending, reply: RoundReply) -> None:
        try:
            await exchange.slots.acquire()
            exchange.put(await self._fetched(pending, reply, holds_slot=True))
        except asyncio.CancelledError:
            exchange.put(self._closed or GridClosed("the Grid was closed"))
            raise

    async def _fetched(self, pending: _Pending, reply: RoundReply, *, holds_slot: bool) -> _Arrival:
        try:
            with _receiving(pending, self._run_name):
                data = await received(reply.content, self._bus.blobs, timeout_s=self._plan.round_s)
        except Exception as error:  # noqa: BLE001 - whatever kept the blob away, it is this client's failure alone
            log.warning("a reply could not be fetched", client=pending.sent.client, reason=str(error))
            failure = Error(NO_REPLY, f"{pending.sent.client}: its reply could not be fetched: {error}")
            return _Arrival(pending, error=failure, holds_slot=holds_slot)
        return _Arrival(pending, reply=reply, data=data, holds_slot=holds_slot)

    async def _send(self, batches: list[tuple[Parcel, list[_Pending]]]) -> None:
        """Offer each parcel once, and publish its messages."""
        outgoing = []
        for parcel, pendings in batches:
            content, offer = await parcel.post(self._bus.blobs, receivers=len(pendings))
            pendings[0].postage.offer = offer
            outgoing += [(pending, content) for pending in pendings]
        for pending, _ in outgoing:
            self._pending[pending.sent.message_id] = pending
            self._apply(self._book.sent(pending.sent))
        await asyncio.gather(*(self._publish(pending, content) for pending, content in outgoing))

    async def _publish(self, pending: _Pending, content: Content) -> None:
        if not self._book.is_open(pending.sent.message_id):
            return
        metadata = pending.message.metadata
        message = RoundMessage(
            task=self._task,
            client=pending.sent.client,
            run=self._run_name,
            message_id=pending.sent.message_id,
            message_type=metadata.message_type,
            round=pending.round or None,
            group_id=metadata.group_id,
            created_at=metadata.created_at,
            ttl_s=metadata.ttl,
            content=content,
        )
        async with self._publishes:
            await self._bus.publish(message, id=pending.sent.message_id)

    async def _pull(self, message_ids: list[str]) -> list[_Arrival]:
        ready = [self._unclaimed.pop(one) for one in message_ids if one in self._unclaimed]
        at_a_time = asyncio.Semaphore(FETCHES)

        async def arrival(pending: _Pending, answer: RoundReply | Error) -> _Arrival:
            if isinstance(answer, Error) or not _has_blob(answer):
                return _arrival(pending, answer)
            async with at_a_time:
                return await self._fetched(pending, answer, holds_slot=False)

        return list(await asyncio.gather(*(arrival(pending, answer) for pending, answer in ready)))

    # --- in the app's threads: Flower's Grid -----------------------------------------------------

    @property
    def run_name(self) -> str:
        """What the run is called on the bus."""
        return self._run_name

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        """Part of Flower's interface; the run was given when the Grid was made."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Who is there. A caller that asks again and again, and sends nothing, is held until somebody comes.

        Raises NotEnoughClients to one that has waited longer than the plan gives for recruiting.
        """
        with self._changed:
            self._must_be_open()
            self._wait_for_more()
            self._must_be_open()
            return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._push(list(messages), timeout=None, exchange=None)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there by now, each once."""
        return [self._received(arrival) for arrival in self._call(self._pull(list(message_ids)))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """The replies as they come, one for each message: those that fail to come are errors."""
        exchange = _Exchange(self._loop)
        ids = self._push(list(messages), timeout=timeout, exchange=exchange)
        return Replies(len(ids), lambda: self._received(exchange.take()))

    def tally(self, round_number: int) -> Tally:
        """Who took part in the round so far."""
        with self._changed:
            tally = self._tallies[round_number]
            return deepcopy(tally)

    def client_of(self, node: int) -> str:
        """The client that Flower knows as *node*."""
        with self._changed:
            return self._nodes.get(node) or self._known(node)

    def _push(
        self, messages: list[Message], *, timeout: float | None, exchange: _Exchange | None
    ) -> list[str]:
        self._must_be_open()
        by_content: dict[int, list[Message]] = {}
        for message in messages:
            by_content.setdefault(id(message.content), []).append(message)
        batches = [self._batch(same, timeout, exchange) for same in by_content.values()]
        if batches:
            self._call(self._send(batches))
        return [message.metadata.message_id for message in messages]

    def _batch(
        self, messages: list[Message], timeout: float | None, exchange: _Exchange | None
    ) -> tuple[Parcel, list[_Pending]]:
        """Messages of one and the same content: encoded and hashed once, here, not on the loop."""
        parcel = Parcel.of(records.encode(messages[0].content))
        postage = _Postage(len(messages))
        return parcel, [self._pending_of(message, timeout, postage, exchange) for message in messages]

    def _pending_of(
        self, message: Message, timeout: float | None, postage: _Postage, exchange: _Exchange | None
    ) -> _Pending:
        stamp(message, uuid7())
        limits = (timeout, self._plan.round_s, message.metadata.ttl)
        timeout_s = min(limit for limit in limits if limit is not None)
        with self._changed:
            node = message.metadata.dst_node_id
            client = self._nodes.get(node) or self._known(node)
            round_number = round_of(message)
            self._latest_round = self._latest_round if round_number is None else round_number
            number = self._latest_round
        sent = Sent(message.metadata.message_id, client, timeout_s, self._loop.time() + timeout_s)
        return _Pending(sent, message, number, postage, exchange)

    def _known(self, node: int) -> str:
        """The client of a node that has just left; whoever sends to it is told by an error reply."""
        gone = {node_id(client): client for client in self._failed}
        return gone.get(node, f"node {node}")

    def _received(self, arrival: _Arrival) -> Message:
        message = _message(arrival, self._run.run_id)
        by_whom = trace.get_current_span()
        if arrival.pending.came_from is not None and by_whom.is_recording():
            by_whom.add_link(arrival.pending.came_from)
        self._count(arrival, message)
        handles(arrival.pending.said_in or handled())
        return message

    def _count(self, arrival: _Arrival, reply: Message) -> None:
        pending, client = arrival.pending, arrival.pending.sent.client
        with self._changed:
            tally = self._tallies[pending.round]
            if reply.has_error():
                tally.failures[client] = str(reply.error.reason).removeprefix(f"{client}: ")
                return
            train_s = arrival.reply.train_s if arrival.reply else 0.0
            tally.answers.append(Exchanged(client, pending.sent.at, pending.answered_at, train_s))
            tally.figures.setdefault(client, {}).update(arrival.reply.figures if arrival.reply else {})
            if pending.message.metadata.message_type.partition(".")[0] == "train":
                tally.participants[client] = samples_in(reply.content)
                tally.train_s[client] = train_s

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* on the loop and wait for it, or for the end of the Grid."""
        with self._changed:
            if self._closed or threading.get_ident() == self._loop_thread:
                coroutine.close()
                raise self._closed or RuntimeError(
                    "the Grid was called on its own loop: it would wait for itself"
                )
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        try:
            return call.result()
        except CancelledError:
            raise self._closed or GridClosed("the loop of the Grid ended") from None
        finally:
            with self._changed:
                self._calls.discard(call)
                self._calls_made += 1

    def _must_be_open(self) -> None:
        if self._closed:
            raise self._closed

    def _wait_for_more(self) -> None:
        """Hold the calling thread if it is one that polls; under the condition."""
        now = time.monotonic()
        asker: _Asker = self._asker.__dict__.setdefault("state", _Asker(now))
        if asker.polls(now, self._calls_made) and not self._pending:
            left = asker.since + self._plan.recruit_s - now
            if left <= 0:
                raise NotEnoughClients(self._nodes.values(), self._failed, self._plan.recruit_s)
            before = set(self._nodes)
            self._changed.wait_for(
                lambda: self._closed is not None or set(self._nodes) != before, min(left, LONGEST_BLOCK_S)
            )
        asker.answered(time.monotonic(), self._calls_made)


@dataclass
class _Asker:
    """A thread that asks who is there. Flower waits for nodes by asking once a second, for ever."""

    since: float
    """When it began to wait."""
    last: float = float("-inf")
    calls_made: int = -1

    def polls(self, now: float, calls_made: int) -> bool:
        """Whether it has done nothing but wait since it last asked. If not, its patience starts anew."""
        shortest, longest = ASKED_AGAIN_S
        idle = calls_made == self.calls_made and now - self.last <= longest
        if not idle:
            self.since = now
        return idle and now - self.last >= shortest

    def answered(self, now: float, calls_made: int) -> None:
        self.last, self.calls_made = now, calls_made


def _receiving(pending: _Pending, run: str) -> AbstractContextManager[trace.Span]:
    """The span of fetching a reply, behind the one in which it was sent."""
    sent_in = pending.came_from
    return tracer.start_as_current_span(
        "receive",
        trace.set_span_in_context(NonRecordingSpan(sent_in)) if sent_in else None,
        attributes={"fedbus.run": run, "fedbus.client": pending.sent.client, "fedbus.round": pending.round},
    )


# --- what messages say --------------------------------------------------------------------------


def round_of(message: Message) -> int | None:
    """The round of *message*: Flower's group, where it is a number, else what strategies write into the config."""
    if message.metadata.group_id.isdecimal():
        return int(message.metadata.group_id)
    for record in message.content.values():
        if isinstance(record, ConfigRecord):
            number = record.get("server-round")
            if isinstance(number, int):
                return number
    return None


def samples_in(content: RecordDict) -> int:
    """How many samples the client says it trained on; 0 where it does not say."""
    for record in content.metric_records.values():
        for key in ("num-examples", "num_examples"):
            value = record.get(key)
            if isinstance(value, int | float):
                return int(value)
    return 0


def _has_blob(reply: RoundReply) -> bool:
    return reply.content is not None and reply.content.blob is not None


def _arrival(pending: _Pending, answer: RoundReply | Error) -> _Arrival:
    """An answer that needs no fetching."""
    if isinstance(answer, Error):
        return _Arrival(pending, error=answer)
    if answer.error_code is not None:
        return _Arrival(pending, reply=answer, error=Error(answer.error_code, answer.error_reason))
    inline = answer.content.inline if answer.content else None
    return _Arrival(pending, reply=answer, data=inline)


def _message(arrival: _Arrival, run_id: int) -> Message:
    """The Flower message of *arrival*; what cannot be read is an error of the client that sent it."""
    metadata = _reply_metadata(arrival, run_id)
    if arrival.error:
        return message_of(metadata, error=arrival.error)
    try:
        content = records.decode(arrival.data or b"")
    except records.UnreadableRecords as error:
        reason = f"{arrival.pending.sent.client}: its reply cannot be read: {error}"
        return message_of(metadata, error=Error(UNKNOWN_ERROR, reason))
    return message_of(metadata, content=content)


def _reply_metadata(arrival: _Arrival, run_id: int) -> Metadata:
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
