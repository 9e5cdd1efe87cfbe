"""Makes replies of the events of workers and of the virtual clock, and hands each to the call that waits for it."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from fedbus.learning.library import ClientReply, ErrorCode, ReplyError
from fedbus.learning.round_timing import ExchangeTiming
from fedbus.learning.run_messenger import UnclaimedReplies, without_payload
from fedbus.simulation.dispatcher import Dispatcher
from fedbus.simulation.engine import (
    Event,
    Replies,
    StateTaken,
    SumTaken,
    WorkerLost,
    WorkerReply,
    WorkerStarted,
)
from fedbus.simulation.exchanges import Call, Exchange
from fedbus.simulation.observer import SimulationObserver, SimulationProgress
from fedbus.simulation.open_exchanges import OpenExchanges
from fedbus.simulation.virtual_time import TransitEnd, VirtualTime

PROGRESS_S: Final = 0.1
"""The shortest time between two reports of progress."""


class ReplyDelivery:
    """The side of a messenger towards its calls. Its methods are called with the lock of the messenger.

    *in_order*: the replies to a call have the order of its messages. *reject* records an error.

    A worker that dies is replaced. Messages that it had got and not answered are sent again, one at a time. A message
    that a worker has handled alone when it died is a failure of its client.
    """

    def __init__(
        self,
        exchanges: OpenExchanges,
        dispatcher: Dispatcher,
        *,
        observer: SimulationObserver,
        now: Callable[[], float],
        virtual: VirtualTime | None,
        in_order: bool,
        reject: Callable[[ClientReply, str], None],
    ) -> None:
        self.exchanges = exchanges
        self.posted = UnclaimedReplies[ClientReply]()
        self.lost_workers = 0
        self._dispatcher = dispatcher
        self._observer = observer
        self._now = now
        self._virtual = virtual
        self._in_order = in_order
        self._reject = reject
        self._last_progress = 0.0

    # --- events -------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Handle an event of a worker."""
        match event:
            case Replies(worker=worker):
                self._dispatcher.record_sign(worker)
                for reply, data in event.payloads():
                    self._on_reply(worker, reply, data)
            case SumTaken(worker=worker, number=number):
                self._on_sum(worker, number, event.payload())
            case StateTaken():
                self._dispatcher.record_state(event)
            case WorkerStarted(worker=worker):
                self._dispatcher.record_sign(worker)
            case WorkerLost(worker=worker, reason=reason):
                self._on_worker_lost(worker, reason)

    def end_transit(self, end: TransitEnd) -> None:
        """Hand over the reply that arrives at its virtual time, or the error of a message whose limit has passed."""
        exchange = self.exchanges.get(end.number)
        if exchange is None:
            return
        if end.has_arrived and exchange.answer is not None:
            self._deliver(exchange, exchange.answer)
        else:
            reason = f"no reply within {exchange.limit_s:g} s of virtual time"
            self.fail(exchange, ErrorCode.MESSAGE_UNAVAILABLE, reason)

    def _on_reply(self, worker: int, reply: WorkerReply, data: memoryview | None) -> None:
        self._dispatcher.record_reply(worker, reply)
        train_s = reply.train_s
        if self._virtual is not None:
            train_s = self._virtual.compute(
                reply.number, train_s=train_s, upload_bytes=reply.size or 0, samples=reply.samples
            )
        exchange = self.exchanges.get(reply.number)
        if exchange is None:  # the limit of the message has passed
            return
        message, now, call = exchange.message, self._now(), exchange.call
        if call.spans is not None:
            call.spans.add_reply(
                exchange.job.position, message.client, reply.seconds, reply.error, worker=worker
            )
        answer = ClientReply(
            request=message,
            round=exchange.round,
            message_id=f"{message.message_id}-reply",
            created_at=reply.created_at,
            ttl_s=reply.ttl_s,
            data=data,
            error=reply.error,
            metrics=reply.metrics,
            samples=reply.samples,
            timing=ExchangeTiming(message.client, now - reply.seconds, now, train_s),
        )
        exchange.answer = answer
        if call.is_detached:
            self.exchanges.close(exchange)
        elif self._virtual is None and (call.sum_request is None or reply.error is not None):
            self._deliver(exchange, answer)
        elif self._virtual is None:
            self.exchanges.add_unsummed(exchange, worker)
            self._report(call)

    def _on_sum(self, worker: int, number: int, data: bytes | memoryview | None) -> None:
        """Hand over the replies whose updates are in the sum; the last of them has it."""
        exchanges = self.exchanges.take_summed(worker, number)
        for position, exchange in enumerate(exchanges, start=1):
            exchange.call.unsummed -= 1
            assert exchange.answer is not None
            is_last = position == len(exchanges)
            if exchange.call.is_detached:
                self.exchanges.close(exchange)
            else:
                self._deliver(exchange, replace(exchange.answer, sum=data) if is_last else exchange.answer)

    def _on_worker_lost(self, worker: int, reason: str) -> None:
        self.lost_workers += 1
        loss = self._dispatcher.lose(worker)
        lost = [self.exchanges.get(job.number) for job in loss.jobs]
        again = []
        for exchange in sorted(
            [one for one in (*self.exchanges.lose_sums(worker), *lost) if one is not None],
            key=lambda one: one.job.number,
        ):
            if exchange.call.is_detached:  # nothing waits for it
                self.exchanges.close(exchange)
            elif exchange.job is not loss.culprit:
                again.append(exchange)
            elif loss.expired_limit_s is not None:
                late = f"no reply within {loss.expired_limit_s:g} s; its worker was ended"
                self.fail(exchange, ErrorCode.MESSAGE_UNAVAILABLE, late)
            elif self._virtual is not None:
                # the error arrives at the virtual time of a reply without content
                self._virtual.compute(exchange.job.number, train_s=0.0, upload_bytes=0)
                exchange.answer = _make_error(exchange, ErrorCode.CLIENT_LOST, reason)
            else:
                self.fail(exchange, ErrorCode.CLIENT_LOST, reason)
        self._dispatcher.add(again, is_first=True)
        without_state = f", and {len(loss.stateful)} clients have lost their state" if loss.stateful else ""
        repeated = f"{len(again)} messages are sent again" if again else "no message is sent again"
        if loss.expired_limit_s is not None:  # the signal that ended the worker is not the cause
            limit = f"{loss.expired_limit_s:g} s (round-s)"
            reason = f"worker {worker} was ended: it took longer than {limit} for one message"
        self._observer.on_warning(f"{reason}. It was replaced; {repeated}{without_state}")

    # --- calls --------------------------------------------------------------------------------

    def fail(self, exchange: Exchange, code: ErrorCode, reason: str) -> None:
        """End *exchange* with an error."""
        self._deliver(exchange, _make_error(exchange, code, reason))

    def detach(self, call: Call, timeout_s: float) -> bool:
        """End the wait for the open messages of *call*, and return whether there are any.

        Their replies can be collected later, if there is no sum.
        """
        waiting = self.exchanges.of_call(call)
        call.ready.extend(call.early.pop(position) for position in sorted(call.early))
        for exchange in waiting:
            reply = _make_error(exchange, ErrorCode.NO_REPLY, f"no reply within {timeout_s:g} s")
            assert reply.error is not None
            self._reject(reply, reply.error.reason)
            call.ready.append(reply)
        if call.spans is not None:
            call.spans.end()
            call.spans = None
        if call.sum_request is None:
            call.is_posted = True
        else:
            call.is_detached = True
            for job in self._dispatcher.cancel(call):
                self.exchanges.close(self.exchanges.by_number[job.number])
        return bool(waiting)

    def end_spans(self, call: Call) -> None:
        """End the span of *call* after its last reply."""
        if call.done == call.total and call.spans is not None:
            call.spans.end()

    def _deliver(self, exchange: Exchange, reply: ClientReply) -> None:
        """Hand *reply* to its call."""
        self.exchanges.close(exchange)
        if self._virtual is not None and reply.timing is not None:
            timing = replace(reply.timing, sent_at=exchange.sent_at, replied_at=self._now())
            reply = replace(reply, timing=timing)
        if reply.error is not None:
            self._reject(reply, reply.error.reason)
        call = exchange.call
        call.done += 1
        call.failed += reply.error is not None
        if call.is_posted:
            self.posted.add(reply.request.message_id, replace(reply, request=without_payload(reply.request)))
        elif self._in_order:
            call.early[exchange.job.position] = reply
            while call.next_position in call.early:
                call.ready.append(call.early.pop(call.next_position))
                call.next_position += 1
        else:
            call.ready.append(reply)
        self._report(call)
        self.end_spans(call)

    def _report(self, call: Call) -> None:
        now = time.monotonic()
        done = call.done + call.unsummed
        if now - self._last_progress >= PROGRESS_S or call.done == call.total:
            self._last_progress = now
            self._observer.on_progress(
                SimulationProgress(
                    round=call.round, kind=call.kind, done=done, failed=call.failed, total=call.total
                )
            )


def _make_error(exchange: Exchange, code: ErrorCode, reason: str) -> ClientReply:
    error = ReplyError(code, f"{exchange.message.client}: {reason}")
    return ClientReply(request=exchange.message, round=exchange.round, error=error)
