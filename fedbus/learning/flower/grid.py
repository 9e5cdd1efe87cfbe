"""Flower's `flwr.serverapp.Grid` over the bus: the ServerApp's messages and replies as events and blobs.

Flower's Grid is synchronous, and the ServerApp's threads call it. The bus runs on an asyncio loop in another
thread. So the Grid has two sides:

- on the loop: `RoundTracker` tracks nodes and open messages; the Grid publishes messages, receives replies
  (`deliver`), and fetches the blobs of replies, at most `MAX_PREFETCHED_REPLIES` ahead of the app;
- in the app's threads: records are encoded, hashed and decoded, and each call blocks (`ReplyQueue`).

Every wait is bounded: a message has a deadline, a node that leaves ends the waits for its replies, and `close`
ends every call with GridClosed.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
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
from fedbus.learning.flower.node_polling import MAX_BLOCK_S, NodePoller, not_enough_clients
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
from fedbus.learning.library import RoundTally
from fedbus.learning.round_timing import ExchangeTiming
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
"""The limit of concurrent publishes that wait for the acknowledgement of the stream."""

log = structlog.get_logger("fedbus.learning")
tracer = get_tracer("fedbus.learning")
T = TypeVar("T")


class BusGrid(Grid):
    """The Grid of one run. Construct it on the event loop of the bus.

    A client without contact for *lost_after_s* seconds counts as lost.
    """

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
        """Count of send and pull calls; a thread that made one since its last poll does not wait for nodes."""
        self._closed: GridClosed | None = None
        self._calls: set[Future[Any]] = set()
        self._pollers = threading.local()
        self._latest_round = 0
        self._event_span: SpanContext | None = None
        """The span in which the event that `deliver` handles was sent."""
        self._event_id = ""
        """The message id of that event."""
        self._tallies: dict[int, RoundTally] = defaultdict(RoundTally)

    # --- on the loop ------------------------------------------------------------------------

    def admit(self, clients: Iterable[str]) -> None:
        """Add *clients* whose `ClientJoined` another agent received."""
        self._apply(self._tracker.admit(clients, self._now()))

    def deliver(self, event: Event, *, sender_span: SpanContext | None = None, message_id: str = "") -> None:
        """Handle an event of a client, with the span in which it was sent and the id of its message.

        Events of other runs, and late or repeated replies, have no effect.
        """
        self._event_span, self._event_id = sender_span, message_id
        self._apply(self._tracker.handle(event, self._now()))
        self._event_span, self._event_id = None, ""

    def close(self, reason: str) -> None:
        """End all current and later calls with GridClosed(*reason*)."""
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
            pending.lease.release_one()
            if pending.queue:
                pending.queue.put(closed)
        self._pending.clear()

    def _now(self) -> float:
        return self._loop.time()

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case ReplyReceived(sent=sent, reply=reply):
                    self._on_reply(sent, reply)
                case ReplyLost(sent=sent, lost_reason=lost_reason, reason=reason):
                    code = NODE_UNAVAILABLE if lost_reason is LostReason.NODE else NO_REPLY
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
        """Set the timer to the next wake time of the tracker, unless it is set to an earlier time."""
        wake = self._tracker.next_deadline()
        if wake is None or self._closed or (self._timer and self._timer.when() <= wake):
            return
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(wake, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._apply(self._tracker.expire(self._now(), connected=self._bus.is_connected))

    def _on_reply(self, sent: SentMessage, reply: RoundReply | Error) -> None:
        pending = self._pending.pop(sent.message_id, None)
        if pending is None:
            return
        pending.lease.release_one()
        pending = replace(
            pending, reply_span=self._event_span, reply_message_id=self._event_id, answered_at=self._now()
        )
        if pending.queue is None:
            self._unclaimed[sent.message_id] = pending, reply
        elif isinstance(reply, Error) or not has_blob(reply):
            pending.queue.put(make_fetched_reply(pending, reply))
        else:
            task = self._loop.create_task(self._fetch_into_queue(pending.queue, pending, reply))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    async def _fetch_into_queue(self, queue: ReplyQueue, pending: PendingMessage, reply: RoundReply) -> None:
        try:
            await queue.slots.acquire()
            queue.put(await self._fetch_reply(pending, reply, holds_slot=True))
        except asyncio.CancelledError:
            queue.put(self._closed or GridClosed("the Grid was closed"))
            raise

    async def _fetch_reply(
        self, pending: PendingMessage, reply: RoundReply, *, holds_slot: bool
    ) -> FetchedReply:
        try:
            with _receive_span(pending, self._run_name):
                data = await fetch_content(reply.content, self._bus.blobs, timeout_s=self._plan.round_s)
        except Exception as error:  # noqa: BLE001 - a failed fetch is the failure of this client only
            log.warning("Reply download failed", client=pending.sent.client, reason=str(error))
            failure = Error(NO_REPLY, f"{pending.sent.client}: download of the reply failed: {error}")
            return FetchedReply(pending, error=failure, holds_slot=holds_slot)
        return FetchedReply(pending, reply=reply, data=data, holds_slot=holds_slot)

    async def _send(self, batches: list[tuple[MessagePayload, list[PendingMessage]]]) -> None:
        """Offer each payload once, and publish its messages."""
        outgoing = []
        for payload, pendings in batches:
            content, offer = await payload.prepare(self._bus.blobs, receivers=len(pendings))
            pendings[0].lease.offer = offer
            outgoing += [(pending, content) for pending in pendings]
        for pending, _ in outgoing:
            self._pending[pending.sent.message_id] = pending
            self._apply(self._tracker.record_sent(pending.sent))
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
        ready = [
            self._unclaimed.pop(message_id) for message_id in message_ids if message_id in self._unclaimed
        ]
        fetch_slots = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

        async def fetch(pending: PendingMessage, reply: RoundReply | Error) -> FetchedReply:
            if isinstance(reply, Error) or not has_blob(reply):
                return make_fetched_reply(pending, reply)
            async with fetch_slots:
                return await self._fetch_reply(pending, reply, holds_slot=False)

        return list(await asyncio.gather(*(fetch(pending, reply) for pending, reply in ready)))

    # --- in the app's threads: Flower's Grid -----------------------------------------------------

    @property
    def run_name(self) -> str:
        """The name of the run on the bus."""
        return self._run_name

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run. Flower's interface requires it; the constructor sets the run already."""
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
        """Return the ids of the present nodes.

        A thread that only polls this method is blocked until a node joins, at most `MAX_BLOCK_S` at a time.

        Raises:
            NotEnoughClients: this thread has polled for longer than the plan's recruiting time.
            GridClosed: the run has ended.

        """
        with self._changed:
            self._check_open()
            self._wait_for_nodes()
            self._check_open()
            return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._push(list(messages), timeout=None, queue=None)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to *message_ids* that have arrived, each once."""
        return [self._take_reply(fetched) for fetched in self._call(self._pull(list(message_ids)))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Send *messages* and return their replies in order of arrival. A lost reply is an error message."""
        queue = ReplyQueue(self._loop)
        ids = self._push(list(messages), timeout=timeout, queue=queue)
        return Replies(len(ids), lambda: self._take_reply(queue.get()))

    def tally(self, round_number: int) -> RoundTally:
        """Return a copy of the participants of the round so far."""
        with self._changed:
            tally = self._tallies[round_number]
            return deepcopy(tally)

    def client_of(self, node: int) -> str:
        """Return the client of Flower's node id *node*."""
        with self._changed:
            return self._nodes.get(node) or self._client_of_failed_node(node)

    def _push(self, messages: list[Message], *, timeout: float | None, queue: ReplyQueue | None) -> list[str]:
        self._check_open()
        by_content: dict[int, list[Message]] = {}
        for message in messages:
            by_content.setdefault(id(message.content), []).append(message)
        batches = [self._encode_batch(batch, timeout, queue) for batch in by_content.values()]
        if batches:
            self._call(self._send(batches))
        return [message.metadata.message_id for message in messages]

    def _encode_batch(
        self, messages: list[Message], timeout: float | None, queue: ReplyQueue | None
    ) -> tuple[MessagePayload, list[PendingMessage]]:
        """Encode and hash the common content of *messages* once, in the app's thread."""
        payload = MessagePayload.from_records(record_codec.encode(messages[0].content))
        lease = OfferLease(len(messages))
        return payload, [self._make_pending(message, timeout, lease, queue) for message in messages]

    def _make_pending(
        self, message: Message, timeout: float | None, lease: OfferLease, queue: ReplyQueue | None
    ) -> PendingMessage:
        set_message_id(message, uuid7())
        limits = (timeout, self._plan.round_s, message.metadata.ttl)
        timeout_s = min(limit for limit in limits if limit is not None)
        with self._changed:
            client = self.client_of(message.metadata.dst_node_id)
            round_number = round_number_of(message)
            self._latest_round = self._latest_round if round_number is None else round_number
            number = self._latest_round
        sent = SentMessage(message.metadata.message_id, client, timeout_s, self._loop.time() + timeout_s)
        return PendingMessage(sent, message, number, lease, queue)

    def _client_of_failed_node(self, node: int) -> str:
        """Return the client of a node that has left; a message to it gets an error reply."""
        failed_nodes = {node_id(client): client for client in self._failed}
        return failed_nodes.get(node, f"node {node}")

    def _take_reply(self, fetched: FetchedReply) -> Message:
        message = decode_reply(fetched, self._run.run_id)
        span = trace.get_current_span()
        if fetched.pending.reply_span is not None and span.is_recording():
            span.add_link(fetched.pending.reply_span)
        self._add_to_tally(fetched, message)
        set_current_cause(fetched.pending.reply_message_id or current_cause())
        return message

    def _add_to_tally(self, fetched: FetchedReply, reply: Message) -> None:
        pending, client = fetched.pending, fetched.pending.sent.client
        with self._changed:
            tally = self._tallies[pending.round]
            if reply.has_error():
                tally.failures[client] = str(reply.error.reason).removeprefix(f"{client}: ")
                return
            train_s = fetched.reply.train_s if fetched.reply else 0.0
            tally.exchanges.append(ExchangeTiming(client, pending.sent.sent_at, pending.answered_at, train_s))
            tally.figures.setdefault(client, {}).update(fetched.reply.figures if fetched.reply else {})
            if pending.message.metadata.message_type.partition(".")[0] == "train":
                tally.participants[client] = sample_count(reply.content)
                tally.train_s[client] = train_s

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* on the loop and wait for its result.

        Raises:
            GridClosed: the Grid is closed, before or during the call.

        """
        with self._changed:
            if self._closed or threading.get_ident() == self._loop_thread:
                coroutine.close()
                raise self._closed or RuntimeError(
                    "the Grid was called on its own event loop, where the call would never return. "
                    "Call it in another thread"
                )
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        try:
            return call.result()
        except CancelledError:
            raise self._closed or GridClosed("the event loop of the Grid has ended") from None
        finally:
            with self._changed:
                self._calls.discard(call)
                self._calls_made += 1

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _wait_for_nodes(self) -> None:
        """Block the calling thread if it only polls for nodes. The caller holds the condition."""
        now = time.monotonic()
        poller: NodePoller = self._pollers.__dict__.setdefault("state", NodePoller(now))
        if poller.is_polling(now, self._calls_made) and not self._pending:
            left_s = poller.since + self._plan.recruit_s - now
            if left_s <= 0:
                raise not_enough_clients(self._nodes.values(), self._failed, self._plan.recruit_s)
            nodes_before = set(self._nodes)
            self._changed.wait_for(
                lambda: self._closed is not None or set(self._nodes) != nodes_before, min(left_s, MAX_BLOCK_S)
            )
        poller.record_answer(time.monotonic(), self._calls_made)


def _receive_span(pending: PendingMessage, run: str) -> AbstractContextManager[trace.Span]:
    """Start the span of a reply download, as a child of the span in which the reply was sent."""
    sender_span = pending.reply_span
    return tracer.start_as_current_span(
        "receive",
        trace.set_span_in_context(NonRecordingSpan(sender_span)) if sender_span else None,
        attributes={"fedbus.run": run, "fedbus.client": pending.sent.client, "fedbus.round": pending.round},
    )
