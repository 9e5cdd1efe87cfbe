"""Flower's Grid over the bus: what a ServerApp pushes and pulls, as events and blobs.

Flower's Grid is synchronous and is called by the ServerApp's threads; the bus lives on an
asyncio loop in another thread. So there are two sides, and each keeps to itself:

- on the loop: `RoundBook` says who is there and who owes what; messages are published, replies
  are handed in (`deliver`), blobs of replies are fetched, at most `FETCHES` ahead of the app;
- in the app's threads: records are encoded, hashed and decoded, and every call waits (`Exchange`).

Nobody waits for ever: a message has a deadline, a node that goes takes its debts with it, and
`close` ends every call with GridClosed.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import structlog
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext

from fedbus.contracts.causation import current_cause, set_current_cause
from fedbus.contracts.client import RoundReply
from fedbus.contracts.envelope import uuid7
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import MessageContent, RoundMessage
from fedbus.contracts.telemetry import get_tracer
from fedbus.learning.bus_protocol import BusProtocol
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.message_payload import MessagePayload, fetch_content
from fedbus.learning.flower.node_ids import node_id, run_number
from fedbus.learning.flower.node_polling import MAX_BLOCK_S, NodePoller, NotEnoughClients
from fedbus.learning.flower.private_api import NO_REPLY, NODE_UNAVAILABLE, Run, empty_run, set_message_id
from fedbus.learning.flower.replies import (
    MAX_PREFETCHED_REPLIES,
    FetchedReply,
    GridClosed,
    OfferLease,
    PendingMessage,
    Replies,
    ReplyQueue,
    decode_reply,
    has_blob,
    make_fetched_reply,
    round_number_of,
    sample_count,
)
from fedbus.learning.round_timing import ExchangeTiming as Exchanged
from fedbus.learning.round_tracker import (
    Effect,
    Event,
    LostReason,
    NodesChanged,
    ReplyLost,
    ReplyReceived,
    RoundTracker,
    SentMessage,
)

MAX_CONCURRENT_PUBLISHES: Final = 64
"""How many messages are on their way into the stream at a time."""

log = structlog.get_logger("fedbus.learning")
tracer = get_tracer("fedbus.learning")
T = TypeVar("T")


@dataclass(frozen=True)
class RoundTally:
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


class BusGrid(Grid):
    """The Grid of one run. Made on the loop that the bus lives on."""

    def __init__(
        self, bus: BusProtocol, *, task: str, run: str, plan: RunPlan, lost_after_s: float = 10.0
    ) -> None:
        self._bus = bus
        self._task = task
        self._run_name = run
        self._run = empty_run(run_number(run))
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        # on the loop
        self._tracker = RoundTracker(run, lost_after_s=lost_after_s)
        self._pending: dict[str, PendingMessage] = {}
        self._unclaimed: dict[str, tuple[PendingMessage, RoundReply | Error]] = {}
        self._publishes = asyncio.Semaphore(MAX_CONCURRENT_PUBLISHES)
        self._fetching: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        # between the threads, under the condition
        self._changed = threading.Condition()
        self._nodes: dict[int, str] = {}
        self._failed: dict[str, str] = {}
        self._calls_made = 0
        """Whoever has sent or pulled something was not merely waiting for nodes."""
        self._closed: GridClosed | None = None
        self._calls: set[Future[Any]] = set()
        self._pollers = threading.local()
        self._latest_round = 0
        self._event_span: SpanContext | None = None
        """Of the event that is being handled."""
        self._event_id = ""
        """Its id."""
        self._tallies: dict[int, RoundTally] = defaultdict(RoundTally)

    # --- on the loop ------------------------------------------------------------------------

    def admit(self, clients: Iterable[str]) -> None:
        """These have joined, as somebody else heard."""
        self._apply(self._tracker.admit(clients, self._now()))

    def deliver(self, event: Event, *, came_from: SpanContext | None = None, said_in: str = "") -> None:
        """An event from a client, the span it was sent in, and the message's id.

        Foreign runs, late and repeated answers are dropped.
        """
        self._event_span, self._event_id = came_from, said_in
        self._apply(self._tracker.handle(event, self._now()))
        self._event_span, self._event_id = None, ""

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
        if self._timer:
            self._timer.cancel()
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
                case ReplyReceived(sent=sent, reply=reply):
                    self._on_reply(sent, reply)
                case ReplyLost(sent=sent, gone=gone, reason=reason):
                    code = NODE_UNAVAILABLE if gone is LostReason.NODE else NO_REPLY
                    self._on_reply(sent, Error(code, f"{sent.client}: {reason}"))
                case NodesChanged():
                    self._update_nodes()
        self._schedule_timer()

    def _update_nodes(self) -> None:
        with self._changed:
            self._nodes = {node_id(client): client for client in self._tracker.nodes}
            self._failed = self._tracker.failed
            self._changed.notify_all()

    def _schedule_timer(self) -> None:
        """Wake up when the book will have something to say; an alarm that is early enough stays."""
        wake = self._tracker.next_wake()
        if wake is None or self._closed or (self._timer and self._timer.when() <= wake):
            return
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(wake, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._apply(self._tracker.passed(self._now(), connected=self._bus.connected))

    def _on_reply(self, sent: SentMessage, answer: RoundReply | Error) -> None:
        pending = self._pending.pop(sent.message_id, None)
        if pending is None:
            return
        pending.postage.answered()
        pending = replace(
            pending, came_from=self._event_span, said_in=self._event_id, answered_at=self._now()
        )
        if pending.exchange is None:
            self._unclaimed[sent.message_id] = pending, answer
        elif isinstance(answer, Error) or not has_blob(answer):
            pending.exchange.put(make_fetched_reply(pending, answer))
        else:
            task = self._loop.create_task(self._fetch_into_queue(pending.exchange, pending, answer))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    async def _fetch_into_queue(
        self, exchange: ReplyQueue, pending: PendingMessage, reply: RoundReply
    ) -> None:
        try:
            await exchange.slots.acquire()
            exchange.put(await self._fetch_reply(pending, reply, holds_slot=True))
        except asyncio.CancelledError:
            exchange.put(self._closed or GridClosed("the Grid was closed"))
            raise

    async def _fetch_reply(
        self, pending: PendingMessage, reply: RoundReply, *, holds_slot: bool
    ) -> FetchedReply:
        try:
            with _receive_span(pending, self._run_name):
                data = await fetch_content(reply.content, self._bus.blobs, timeout_s=self._plan.round_s)
        except Exception as error:  # noqa: BLE001 - whatever kept the blob away, it is this client's failure alone
            log.warning("a reply could not be fetched", client=pending.sent.client, reason=str(error))
            failure = Error(NO_REPLY, f"{pending.sent.client}: its reply could not be fetched: {error}")
            return FetchedReply(pending, error=failure, holds_slot=holds_slot)
        return FetchedReply(pending, reply=reply, data=data, holds_slot=holds_slot)

    async def _send(self, batches: list[tuple[MessagePayload, list[PendingMessage]]]) -> None:
        """Offer each parcel once, and publish its messages."""
        outgoing = []
        for parcel, pendings in batches:
            content, offer = await parcel.post(self._bus.blobs, receivers=len(pendings))
            pendings[0].postage.offer = offer
            outgoing += [(pending, content) for pending in pendings]
        for pending, _ in outgoing:
            self._pending[pending.sent.message_id] = pending
            self._apply(self._tracker.sent(pending.sent))
        await asyncio.gather(*(self._publish(pending, content) for pending, content in outgoing))

    async def _publish(self, pending: PendingMessage, content: MessageContent) -> None:
        if not self._tracker.is_open(pending.sent.message_id):
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

    async def _pull(self, message_ids: list[str]) -> list[FetchedReply]:
        ready = [self._unclaimed.pop(one) for one in message_ids if one in self._unclaimed]
        at_a_time = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

        async def arrival(pending: PendingMessage, answer: RoundReply | Error) -> FetchedReply:
            if isinstance(answer, Error) or not has_blob(answer):
                return make_fetched_reply(pending, answer)
            async with at_a_time:
                return await self._fetch_reply(pending, answer, holds_slot=False)

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
            self._check_open()
            self._wait_for_nodes()
            self._check_open()
            return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._push(list(messages), timeout=None, exchange=None)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there by now, each once."""
        return [self._take_reply(arrival) for arrival in self._call(self._pull(list(message_ids)))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """The replies as they come, one for each message: those that fail to come are errors."""
        exchange = ReplyQueue(self._loop)
        ids = self._push(list(messages), timeout=timeout, exchange=exchange)
        return Replies(len(ids), lambda: self._take_reply(exchange.take()))

    def tally(self, round_number: int) -> RoundTally:
        """Who took part in the round so far."""
        with self._changed:
            tally = self._tallies[round_number]
            return deepcopy(tally)

    def client_of(self, node: int) -> str:
        """The client that Flower knows as *node*."""
        with self._changed:
            return self._nodes.get(node) or self._client_of_failed_node(node)

    def _push(
        self, messages: list[Message], *, timeout: float | None, exchange: ReplyQueue | None
    ) -> list[str]:
        self._check_open()
        by_content: dict[int, list[Message]] = {}
        for message in messages:
            by_content.setdefault(id(message.content), []).append(message)
        batches = [self._encode_batch(same, timeout, exchange) for same in by_content.values()]
        if batches:
            self._call(self._send(batches))
        return [message.metadata.message_id for message in messages]

    def _encode_batch(
        self, messages: list[Message], timeout: float | None, exchange: ReplyQueue | None
    ) -> tuple[MessagePayload, list[PendingMessage]]:
        """Messages of one and the same content: encoded and hashed once, here, not on the loop."""
        parcel = MessagePayload.of(record_codec.encode(messages[0].content))
        postage = OfferLease(len(messages))
        return parcel, [self._make_pending(message, timeout, postage, exchange) for message in messages]

    def _make_pending(
        self, message: Message, timeout: float | None, postage: OfferLease, exchange: ReplyQueue | None
    ) -> PendingMessage:
        set_message_id(message, uuid7())
        limits = (timeout, self._plan.round_s, message.metadata.ttl)
        timeout_s = min(limit for limit in limits if limit is not None)
        with self._changed:
            node = message.metadata.dst_node_id
            client = self._nodes.get(node) or self._client_of_failed_node(node)
            round_number = round_number_of(message)
            self._latest_round = self._latest_round if round_number is None else round_number
            number = self._latest_round
        sent = SentMessage(message.metadata.message_id, client, timeout_s, self._loop.time() + timeout_s)
        return PendingMessage(sent, message, number, postage, exchange)

    def _client_of_failed_node(self, node: int) -> str:
        """The client of a node that has just left; whoever sends to it is told by an error reply."""
        gone = {node_id(client): client for client in self._failed}
        return gone.get(node, f"node {node}")

    def _take_reply(self, arrival: FetchedReply) -> Message:
        message = decode_reply(arrival, self._run.run_id)
        by_whom = trace.get_current_span()
        if arrival.pending.came_from is not None and by_whom.is_recording():
            by_whom.add_link(arrival.pending.came_from)
        self._add_to_tally(arrival, message)
        set_current_cause(arrival.pending.said_in or current_cause())
        return message

    def _add_to_tally(self, arrival: FetchedReply, reply: Message) -> None:
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
                tally.participants[client] = sample_count(reply.content)
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

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _wait_for_nodes(self) -> None:
        """Hold the calling thread if it is one that polls; under the condition."""
        now = time.monotonic()
        asker: NodePoller = self._pollers.__dict__.setdefault("state", NodePoller(now))
        if asker.polls(now, self._calls_made) and not self._pending:
            left = asker.since + self._plan.recruit_s - now
            if left <= 0:
                raise NotEnoughClients(self._nodes.values(), self._failed, self._plan.recruit_s)
            before = set(self._nodes)
            self._changed.wait_for(
                lambda: self._closed is not None or set(self._nodes) != before, min(left, MAX_BLOCK_S)
            )
        asker.answered(time.monotonic(), self._calls_made)


def _receive_span(pending: PendingMessage, run: str) -> AbstractContextManager[trace.Span]:
    """The span of fetching a reply, behind the one in which it was sent."""
    sent_in = pending.came_from
    return tracer.start_as_current_span(
        "receive",
        trace.set_span_in_context(NonRecordingSpan(sent_in)) if sent_in else None,
        attributes={"fedbus.run": run, "fedbus.client": pending.sent.client, "fedbus.round": pending.round},
    )
