"""The messages of one run between a training library and its clients, as events and blobs on the bus.

A library is synchronous, and calls the messenger in any thread. The bus runs on an asyncio loop in another
thread. So the messenger has two sides:

- on the loop: `RoundTracker` tracks clients and open messages; the messenger publishes messages, receives replies
  (`deliver`), and fetches the blobs of replies, at most `MAX_PREFETCHED_REPLIES` ahead of the library;
- in the library's threads: payloads are hashed, and each call blocks (`ReplyQueue`).

Every wait is bounded: a message has a deadline, a client that leaves ends the waits for its replies, and `close`
ends every call with MessengerClosed.
"""

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final, TypeVar

import structlog
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext

from fedbus.contracts.causation import current_cause, set_current_cause
from fedbus.contracts.client import RoundReply
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RunPlan
from fedbus.contracts.telemetry import get_tracer
from fedbus.learning.bus_protocol import BusProtocol
from fedbus.learning.library import (
    ClientReply,
    ErrorCode,
    MessengerClosed,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
)
from fedbus.learning.payload import Payload, fetch_content
from fedbus.learning.reply_order import RepliesInClientOrder
from fedbus.learning.reply_queue import (
    MAX_PREFETCHED_REPLIES,
    FetchedReply,
    OfferLease,
    PendingMessage,
    ReplyQueue,
    has_blob,
    make_fetched_reply,
)
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
from fedbus.learning.run_messenger import RunMessenger, UnclaimedReplies, without_payload

__all__ = ["MAX_CONCURRENT_PUBLISHES", "MAX_PREFETCHED_REPLIES", "BusMessenger"]

MAX_CONCURRENT_PUBLISHES: Final = 64
"""The limit of concurrent publishes that wait for the acknowledgement of the stream."""

log = structlog.get_logger("fedbus.learning")
tracer = get_tracer("fedbus.learning")
T = TypeVar("T")


class BusMessenger(RunMessenger):
    """The `Messenger` of one run. Construct it on the event loop of the bus.

    A client without contact for *lost_after_s* seconds counts as lost.
    """

    def __init__(
        self, bus: BusProtocol, *, task: str, run: str, plan: RunPlan, lost_after_s: float = 10.0
    ) -> None:
        super().__init__(run, plan, threading.Condition())  # the lock between the threads
        self._bus = bus
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        # on the loop
        self._tracker = RoundTracker(run, lost_after_s=lost_after_s)
        self._pending: dict[str, PendingMessage] = {}
        self._unclaimed = UnclaimedReplies[tuple[PendingMessage, RoundReply | ReplyError]]()
        self._publishes = asyncio.Semaphore(MAX_CONCURRENT_PUBLISHES)
        self._arrivals = asyncio.Event()
        """Set when a reply to a posted message arrives, and when the clients change."""
        self._fetching: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        # between the threads, under the condition
        self._clients: list[str] = []
        self._failed: dict[str, str] = {}
        self._calls: set[Future[Any]] = set()
        self._event_span: SpanContext | None = None
        """The span in which the event that `deliver` handles was sent."""
        self._event_id = ""
        """The message id of that event."""

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
        """End all current and later calls with MessengerClosed(*reason*)."""
        closed = MessengerClosed(reason)
        with self._changed:
            self._end(reason)
            calls = list(self._calls)
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
                    is_lost = lost_reason is LostReason.NODE
                    code = ErrorCode.CLIENT_LOST if is_lost else ErrorCode.MESSAGE_UNAVAILABLE
                    self._on_reply(sent, ReplyError(code, f"{sent.client}: {reason}"))
                case NodesChanged():
                    self._update_clients()
        self._schedule_timer()

    def _update_clients(self) -> None:
        with self._changed:
            self._clients = self._tracker.nodes
            self._failed = self._tracker.failed
            self._changed.notify_all()
        self._arrivals.set()

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

    def _on_reply(self, sent: SentMessage, reply: RoundReply | ReplyError) -> None:
        pending = self._pending.pop(sent.message_id, None)
        if pending is None:
            return
        pending.lease.release_one()
        pending = replace(
            pending, reply_span=self._event_span, reply_message_id=self._event_id, answered_at=self._now()
        )
        if pending.queue is None:
            self._keep_for_collect(pending, reply)
        elif isinstance(reply, ReplyError) or not has_blob(reply):
            pending.queue.put(make_fetched_reply(pending, reply))
        else:
            task = self._loop.create_task(self._fetch_into_queue(pending.queue, pending, reply))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    def _keep_for_collect(self, pending: PendingMessage, reply: RoundReply | ReplyError) -> None:
        """Keep *reply* without the payload of its request, for `collect` and `take`."""
        without = replace(pending, message=without_payload(pending.message))
        self._unclaimed.add(pending.sent.message_id, (without, reply))
        self._arrivals.set()

    async def _take_unclaimed(self, timeout_s: float, clients: frozenset[str] | None) -> FetchedReply | None:
        """Wait for the oldest reply to a posted message, and download it."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._unclaimed and (clients is None or clients == set(self._tracker.nodes)):
                    self._arrivals.clear()
                    await self._arrivals.wait()
        except TimeoutError:
            pass
        oldest = self._unclaimed.take()
        if oldest is None:
            return None
        pending, reply = oldest
        if isinstance(reply, ReplyError) or not has_blob(reply):
            return make_fetched_reply(pending, reply)
        return await self._fetch_reply(pending, reply, holds_slot=False)

    async def _fetch_into_queue(self, queue: ReplyQueue, pending: PendingMessage, reply: RoundReply) -> None:
        try:
            await queue.slots.acquire()
            queue.put(await self._fetch_reply(pending, reply, holds_slot=True))
        except asyncio.CancelledError:
            queue.put(self._closed or MessengerClosed("the run is over"))
            raise

    async def _fetch_reply(
        self, pending: PendingMessage, reply: RoundReply, *, holds_slot: bool
    ) -> FetchedReply:
        try:
            with _receive_span(pending, self._run):
                data = await fetch_content(reply.content, self._bus.blobs, timeout_s=self._plan.round_s)
        except Exception as error:  # noqa: BLE001 - a failed fetch is the failure of this client only
            log.warning("Reply download failed", client=pending.sent.client, reason=str(error))
            reason = f"{pending.sent.client}: download of the reply failed: {error}"
            failure = ReplyError(ErrorCode.MESSAGE_UNAVAILABLE, reason)
            return FetchedReply(pending, error=failure, holds_slot=holds_slot)
        return FetchedReply(pending, reply=reply, data=data, holds_slot=holds_slot)

    def _detach(self, queue: ReplyQueue, timeout_s: float) -> None:
        """End the wait of a call for its open messages. Their replies can be collected later."""
        waiting = [pending for pending in self._pending.values() if pending.queue is queue]
        for pending in waiting:
            pending.lease.release_one()
            request = without_payload(pending.message)
            detached = replace(pending, message=request, queue=None, lease=OfferLease(1))
            self._pending[pending.sent.message_id] = detached
            reason = f"{pending.sent.client}: no reply within {timeout_s:g} s"
            queue.put(FetchedReply(pending, error=ReplyError(ErrorCode.NO_REPLY, reason)))

    async def _send(self, batches: list[tuple[Payload, list[PendingMessage]]]) -> None:
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
        message = pending.message
        round_message = RoundMessage(
            task=self._task,
            client=message.client,
            run=self._run,
            message_id=message.message_id,
            message_type=message.kind,
            round=pending.round or None,
            group_id=message.group_id,
            created_at=message.created_at,
            ttl_s=pending.sent.timeout_s if message.ttl_s is None else message.ttl_s,
            content=content,
        )
        async with self._publishes:
            await self._bus.publish(round_message, id=message.message_id)

    async def _collect(self, message_ids: list[str]) -> list[FetchedReply]:
        ready = self._unclaimed.collect(message_ids)
        fetch_slots = asyncio.Semaphore(MAX_PREFETCHED_REPLIES)

        async def fetch(pending: PendingMessage, reply: RoundReply | ReplyError) -> FetchedReply:
            if isinstance(reply, ReplyError) or not has_blob(reply):
                return make_fetched_reply(pending, reply)
            async with fetch_slots:
                return await self._fetch_reply(pending, reply, holds_slot=False)

        return list(await asyncio.gather(*(fetch(pending, reply) for pending, reply in ready)))

    # --- in the library's threads: `fedbus.learning.library.Messenger` ----------------------------

    @property
    def has_open_messages(self) -> bool:
        return bool(self._pending)

    @property
    def adds_updates(self) -> bool:
        return False  # each client is a process of its own

    def now(self) -> float:
        return self._now()

    def clients(self) -> list[str]:
        with self._changed:
            self._check_open()
            return list(self._clients)

    def failed_clients(self) -> dict[str, str]:
        with self._changed:
            self._check_open()
            return dict(self._failed)

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        limit_s = self._plan.recruit_s if timeout_s is None else timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._clients) >= count, limit_s)
            self._check_open()
            if len(self._clients) < count:
                raise NotEnoughClients(self._describe_missing(count, limit_s))
            return list(self._clients)

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        before = set(clients)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or set(self._clients) != before, timeout_s)
            self._check_open()
            return list(self._clients)

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        queue = ReplyQueue(self._loop)
        end = None if timeout_s is None else self._loop.time() + timeout_s
        sent = list(messages)
        self._post(sent, queue)
        if end is not None and timeout_s is not None:
            left_s = max(0.0, end - self._loop.time())
            self._loop.call_soon_threadsafe(self._loop.call_later, left_s, self._detach, queue, timeout_s)
        replies = _ReplyStream(len(sent), lambda: self._take(queue.get()))
        if not self._plan.deterministic:
            return replies
        return RepliesInClientOrder(replies, [without_payload(one) for one in sent])

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        return self._post(messages, None)

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        return [self._take(fetched) for fetched in self._call(self._collect(list(message_ids)))]

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        before = None if clients is None else frozenset(clients)
        fetched = self._call(self._take_unclaimed(timeout_s, before))
        return None if fetched is None else self._take(fetched)

    def _post(self, messages: Iterable[OutgoingMessage], queue: ReplyQueue | None) -> list[str]:
        with self._changed:
            self._check_open()
        by_payload: dict[int, list[OutgoingMessage]] = {}
        ids = []
        for message in messages:
            by_payload.setdefault(id(message.payload), []).append(message)
            ids.append(message.message_id)
        batches = []
        for batch in by_payload.values():
            _ = batch[0].payload.sha256  # computed in this thread, not on the loop
            lease = OfferLease(len(batch))
            pendings = [self._make_pending(message, lease, queue) for message in batch]
            batches.append((batch[0].payload, pendings))
        if batches:
            self._call(self._send(batches))
        return ids

    def _make_pending(
        self, message: OutgoingMessage, lease: OfferLease, queue: ReplyQueue | None
    ) -> PendingMessage:
        limit_s = self._limit_s(message)
        sent = SentMessage(message.message_id, message.client, limit_s, self._loop.time() + limit_s)
        return PendingMessage(sent, message, self._round_of(message), lease, queue)

    def _take(self, fetched: FetchedReply) -> ClientReply:
        """Make the library's reply, and link the current span and cause to it. An error is recorded at once."""
        pending, reply = fetched.pending, fetched.reply
        span = trace.get_current_span()
        if pending.reply_span is not None and span.is_recording():
            span.add_link(pending.reply_span)
        set_current_cause(pending.reply_message_id or current_cause())
        if reply is None:
            client_reply = ClientReply(request=pending.message, round=pending.round, error=fetched.error)
        else:
            client_reply = ClientReply(
                request=pending.message,
                round=pending.round,
                message_id=reply.message_id,
                created_at=reply.created_at,
                ttl_s=reply.ttl_s,
                data=fetched.data,
                error=fetched.error,
                metrics=reply.figures,
                timing=ExchangeTiming(
                    pending.sent.client, pending.sent.sent_at, pending.answered_at, reply.train_s
                ),
            )
        if fetched.error is not None:
            self.reject(client_reply, fetched.error.reason)
        return client_reply

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* on the loop and wait for its result.

        Raises:
            MessengerClosed: the messenger is closed, before or during the call.

        """
        with self._changed:
            if self._closed or threading.get_ident() == self._loop_thread:
                coroutine.close()
                raise self._closed or RuntimeError(
                    "the messenger was called on its own event loop, where the call would never return. "
                    "Call it in another thread"
                )
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        try:
            return call.result()
        except CancelledError:
            raise self._closed or MessengerClosed("the event loop of the messenger has ended") from None
        finally:
            with self._changed:
                self._calls.discard(call)

    def _describe_missing(self, count: int, limit_s: float) -> str:
        present = ", ".join(sorted(self._clients)) or "none"
        failed = (
            ", ".join(f"{client} ({reason})" for client, reason in sorted(self._failed.items())) or "none"
        )
        return (
            f"the run waited for {count} clients (limit {limit_s:g} s). "
            f"Present: {present}. Failed: {failed}. Start more clients"
        )


class _ReplyStream(Iterator[ClientReply]):
    """The replies to one call of `send`. It raises MessengerClosed for each step after the end of the run."""

    def __init__(self, count: int, take: Callable[[], ClientReply]) -> None:
        self._left = count
        self._take = take

    def __next__(self) -> ClientReply:
        if not self._left:
            raise StopIteration
        reply = self._take()
        self._left -= 1
        return reply


def _receive_span(pending: PendingMessage, run: str) -> AbstractContextManager[trace.Span]:
    """Start the span of a reply download, as a child of the span in which the reply was sent."""
    sender_span = pending.reply_span
    return tracer.start_as_current_span(
        "receive",
        trace.set_span_in_context(NonRecordingSpan(sender_span)) if sender_span else None,
        attributes={"fedbus.run": run, "fedbus.client": pending.sent.client, "fedbus.round": pending.round},
    )
