"""The `Messenger` of a simulated run: messages go to the workers of an engine, replies come back.

The thread that waits for a reply runs the exchange with the engine itself; no other thread is needed, and nothing
polls. If several threads wait, one of them does it, and the others wait for it. After the first `post`, a thread of the
messenger does it while no other thread waits.

With a profile, the clock is virtual (`VirtualTime`): replies are handed over in the order of their virtual arrival.

A worker that dies is replaced. Messages that it had got and not answered are sent again, one at a time. A message that
a worker has handled alone when it died is a failure of its client.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Final

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    ClientReply,
    ErrorCode,
    MessengerClosed,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_tallies import RoundTallies
from fedbus.learning.round_timing import ExchangeTiming
from fedbus.simulation.client_spans import ClientSpans
from fedbus.simulation.dispatcher import Dispatcher
from fedbus.simulation.engine import (
    EngineFailed,
    Event,
    Replies,
    SimulationEngine,
    StateTaken,
    SumRequest,
    SumTaken,
    WorkerLost,
    WorkerReply,
    WorkerStarted,
)
from fedbus.simulation.exchanges import Call, Exchange, PlacedPayload
from fedbus.simulation.observer import SimulationObserver, SimulationProgress
from fedbus.simulation.scheduling import Job
from fedbus.simulation.virtual_time import VirtualTime

PROGRESS_S: Final = 0.1
"""The shortest time between two reports of progress."""
MAX_UNCLAIMED_REPLIES: Final = 10_000
"""The limit of replies to posted messages that are neither taken nor collected; the oldest is dropped."""

_NO_PAYLOAD: Final = Payload.pack(())


class SimulationMessenger:
    """The `Messenger` of one simulated run on the workers of *engine*, which is started.

    The clients are those with the names *clients*. All of them are present, unless *virtual* has a profile in which
    some are absent. *adds_updates* is whether workers may add up updates.
    """

    def __init__(
        self,
        engine: SimulationEngine,
        *,
        run: str,
        plan: RunPlan,
        clients: list[str],
        observer: SimulationObserver,
        is_deterministic: bool = False,
        adds_updates: bool = False,
        virtual: VirtualTime | None = None,
    ) -> None:
        self._engine = engine
        self._run = run
        self._plan = plan
        self._clients = clients
        self._indices = {client: index for index, client in enumerate(clients)}
        self._observer = observer
        self._spans = ClientSpans(run)
        self._is_deterministic = is_deterministic
        self._adds_updates = adds_updates and not is_deterministic and virtual is None
        self._virtual = virtual
        self._changed = threading.Condition(threading.RLock())
        self._is_pumping = False
        self._pump_thread: threading.Thread | None = None
        self._exchanges: dict[int, Exchange] = {}
        self._dispatcher = Dispatcher(
            engine, self._exchanges, in_order=is_deterministic, has_time_limits=virtual is None
        )
        self._next_number = 0
        self._unsummed: dict[tuple[int, int], list[Exchange]] = {}
        """Answered messages whose updates are in a sum that has not arrived, by worker and call."""
        self._posted: dict[str, ClientReply] = {}
        """Replies to posted messages, until they are taken or collected, by message id in order of arrival."""
        self._latest_round = 0
        self._tallies = RoundTallies()
        self._closed: MessengerClosed | None = None
        self._last_progress = 0.0
        self.failure: Exception | None = None
        """Why the engine ended; None if it did not."""
        self.lost_workers = 0

    # --- `fedbus.learning.library.Messenger` --------------------------------------------------

    @property
    def run(self) -> str:
        return self._run

    @property
    def plan(self) -> RunPlan:
        return self._plan

    @property
    def has_open_messages(self) -> bool:
        return bool(self._exchanges)

    @property
    def adds_updates(self) -> bool:
        return self._adds_updates

    def now(self) -> float:
        return time.monotonic() if self._virtual is None else self._virtual.now

    def clients(self) -> list[str]:
        with self._changed:
            self._check_open()
            return list(self._present())

    def failed_clients(self) -> dict[str, str]:
        self._check_open()
        return {}

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        if len(self._clients) < count:
            raise NotEnoughClients(
                f"the run needs {count} clients, and the simulation has {len(self._clients)}. "
                f"Simulate at least {count} clients, or lower the minimum of the strategy"
            )
        limit_s = self._plan.recruit_s if timeout_s is None else timeout_s
        if not self._wait_until(lambda: len(self._present()) >= count, limit_s, watches_presence=True):
            raise NotEnoughClients(
                f"the run waited for {count} clients (limit {limit_s:g} s of virtual time). Present: "
                f"{len(self._present())} of {len(self._clients)}. The profile makes the others absent"
            )
        return self.clients()

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        before = set(clients)
        self._wait_until(lambda: set(self._present()) != before, timeout_s, watches_presence=True)
        return self.clients()

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        deadline = None if timeout_s is None else self.now() + timeout_s
        call, _ = self._post(messages, is_posted=False)
        return self._receive(call, deadline, timeout_s)

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        _, ids = self._post(messages, is_posted=True)
        self._start_pump_thread()
        return ids

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        """Return the replies that have arrived. A virtual clock moves to the next arrival if there is none yet."""
        ids = list(message_ids)
        if self._virtual is not None and self._exchanges:
            count = len(self._exchanges)
            self._wait_until(
                lambda: any(one in self._posted for one in ids) or len(self._exchanges) < count, math.inf
            )
        with self._changed:
            self._check_open()
            return [self._posted.pop(message_id) for message_id in ids if message_id in self._posted]

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        before = None if clients is None else set(clients)
        self._wait_until(
            lambda: bool(self._posted) or (before is not None and set(self._present()) != before),
            timeout_s,
            watches_presence=before is not None,
        )
        with self._changed:
            first = next(iter(self._posted), None)
            return None if first is None else self._posted.pop(first)

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        with self._changed:
            self._tallies.accept(reply, samples)

    def reject(self, reply: ClientReply, reason: str) -> None:
        with self._changed:
            self._tallies.reject(reply, reason)

    def tally(self, round_number: int) -> RoundTally:
        with self._changed:
            return self._tallies.copy(round_number)

    def close(self, reason: str) -> None:
        """End all current and later calls with MessengerClosed(*reason*)."""
        with self._changed:
            self._closed = self._closed or MessengerClosed(reason)
            self._changed.notify_all()
        self._engine.wake()

    def join(self) -> None:
        """Wait for the thread of the messenger, after `close`. Then no thread is in the engine."""
        if self._pump_thread is not None:
            self._pump_thread.join()

    # --- sending ------------------------------------------------------------------------------

    def _post(self, messages: Iterable[OutgoingMessage], *, is_posted: bool) -> tuple[Call, list[str]]:
        outgoing = list(messages)
        ids = [message.message_id for message in outgoing]
        if self._is_deterministic:  # replies have this order, as on the fleet
            outgoing.sort(key=lambda message: message.client)
        with self._changed:
            self._check_open()
            self._next_number += 1
            call = Call(self._next_number, is_posted=is_posted)
            call.total = len(outgoing)
            by_payload: dict[int, PlacedPayload] = {}
            exchanges = [
                self._open(message, call, position, by_payload) for position, message in enumerate(outgoing)
            ]
            if outgoing:
                call.kind, call.round = outgoing[-1].kind, self._latest_round
                open_spans = self._spans.open_post if is_posted else self._spans.open_call
                call.spans = open_spans(round_number=call.round, kind=call.kind, total=call.total)
            self._dispatcher.add([one for one in exchanges if self._begin(one)])
            self._end_call(call)
            if self._is_pumping:
                self._engine.wake()
            else:
                self._dispatcher.dispatch()
        return call, ids

    def _open(
        self, message: OutgoingMessage, call: Call, position: int, by_payload: dict[int, PlacedPayload]
    ) -> Exchange:
        """Open the exchange of *message*, the reply to which call waits for."""
        if message.round is not None:
            self._latest_round = message.round
        placed = by_payload.get(id(message.payload))
        if placed is None:
            placed = PlacedPayload(self._place(message.payload), message.payload.size_bytes)
            by_payload[id(message.payload)] = placed
        placed.open_messages += 1
        if message.sum is not None and call.sum_request is None:
            call.sum_request = SumRequest(call.number, message.sum)
        self._next_number += 1
        client = self._indices.get(message.client, -1)
        limits = (self._plan.round_s, message.ttl_s)
        exchange = Exchange(
            message,
            self._latest_round,
            call,
            placed,
            Job(self._next_number, client, message.kind, position, call=call.number),
            min(limit for limit in limits if limit is not None),
            self.now(),
        )
        self._exchanges[self._next_number] = exchange
        return exchange

    def _begin(self, exchange: Exchange) -> bool:
        """Begin the exchange. Return whether a worker has to answer the message."""
        client = exchange.message.client
        if exchange.job.client < 0:
            self._fail(exchange, ErrorCode.CLIENT_LOST, "there is no such client")
            return False
        if self._virtual is None:
            return True
        if client not in self._present():
            self._fail(exchange, ErrorCode.CLIENT_LOST, "the client is not connected")
            return False
        return self._virtual.send(
            exchange.job.number,
            client,
            exchange.message.kind,
            download_bytes=exchange.placed.size_bytes,
            limit_s=exchange.limit_s,
        )

    def _place(self, payload: Payload) -> int:
        try:
            return self._engine.place(payload)
        except EngineFailed as error:
            self._fail_engine(error)
            raise self._closed or MessengerClosed(str(error)) from error

    # --- waiting ------------------------------------------------------------------------------

    def _receive(self, call: Call, deadline: float | None, timeout_s: float | None) -> Iterator[ClientReply]:
        for left in range(call.total, 0, -1):
            if not call.ready:
                left_s = None if deadline is None else max(0.0, deadline - self.now())
                if not self._wait_until(lambda: bool(call.ready), left_s):
                    self._detach(call, timeout_s or 0.0)
            elif self._closed:
                raise self._closed
            if left == 1 and call.spans is not None:
                call.spans.link_current_span()
            yield call.ready.popleft()

    def _detach(self, call: Call, timeout_s: float) -> None:
        """End the wait for the open messages of *call*. Their replies can be collected later, if there is no sum."""
        with self._changed:
            waiting = [one for one in self._exchanges.values() if one.call is call]
            for exchange in waiting:
                error = ReplyError(
                    ErrorCode.NO_REPLY, f"{exchange.message.client}: no reply within {timeout_s:g} s"
                )
                reply = ClientReply(request=exchange.message, round=exchange.round, error=error)
                self.reject(reply, error.reason)
                call.ready.append(reply)
            if call.spans is not None:
                call.spans.end()
                call.spans = None
            if call.sum_request is None:
                call.is_posted = True
            else:
                call.is_detached = True
                for job in self._dispatcher.cancel(call):
                    self._close_exchange(self._exchanges[job.number])
        if waiting:
            self._start_pump_thread()

    def _wait_until(
        self, is_ready: Callable[[], bool], timeout_s: float | None, *, watches_presence: bool = False
    ) -> bool:
        """Exchange messages with the workers until *is_ready*. Return False if the time is over before.

        With *watches_presence*, a virtual clock stops when clients come or go.

        Raises:
            MessengerClosed: the run has ended.

        """
        deadline = math.inf if timeout_s is None else self.now() + timeout_s
        with self._changed:
            while True:
                self._check_open()
                if is_ready():
                    return True
                left_s = deadline - self.now()
                if left_s <= 0:
                    return False
                if self._is_pumping:
                    self._changed.wait(left_s if self._virtual is None and left_s < math.inf else None)
                elif self._virtual is None:
                    self._pump(left_s)
                elif not self._advance(self._virtual, deadline, watches_presence=watches_presence):
                    return False

    def _advance(self, virtual: VirtualTime, deadline: float, *, watches_presence: bool) -> bool:
        """Move the virtual clock by one event, or wait for workers. Return whether anything can happen."""
        until = min(deadline, virtual.next_presence_change()) if watches_presence else deadline
        end = virtual.advance(until)
        if end is not None:
            exchange = self._exchanges.get(end.number)
            if exchange is None:
                return True
            if end.has_arrived and exchange.answer is not None:
                self._deliver(exchange, exchange.answer)
            else:
                reason = f"no reply within {exchange.limit_s:g} s of virtual time"
                self._fail(exchange, ErrorCode.MESSAGE_UNAVAILABLE, reason)
            return True
        if virtual.waits_for_workers and virtual.now < until:
            self._pump(math.inf)
            return True
        return virtual.now >= until

    def _pump(self, timeout_s: float) -> None:
        """Wait once for events of the workers. The caller has the lock, which is released meanwhile."""
        self._is_pumping = True
        try:
            self._dispatcher.dispatch()
            limit_s = min(timeout_s, self._dispatcher.expire())
            self._changed.release()
            try:
                events = self._engine.wait(None if math.isinf(limit_s) else limit_s)
            finally:
                self._changed.acquire()
            for event in events:
                self._handle(event)
            self._dispatcher.dispatch()
        except Exception as error:  # noqa: BLE001 - the run ends with it, in the thread of the simulation
            self._fail_engine(error)
        finally:
            self._is_pumping = False
            self._changed.notify_all()

    def _start_pump_thread(self) -> None:
        """Start the thread that exchanges messages while no call waits for them, for messages that are posted."""
        with self._changed:
            if self._pump_thread is None and not self._closed:
                self._pump_thread = threading.Thread(
                    target=self._run_pump_thread, name="simulation messenger", daemon=True
                )
                self._pump_thread.start()
            self._changed.notify_all()

    def _run_pump_thread(self) -> None:
        with self._changed:
            while not self._closed:
                if self._is_pumping or not any(one.answer is None for one in self._exchanges.values()):
                    self._changed.wait()
                else:
                    self._pump(math.inf)

    # --- events -------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
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

    def _on_reply(self, worker: int, reply: WorkerReply, data: memoryview | None) -> None:
        self._dispatcher.record_reply(worker, reply)
        train_s = reply.train_s
        if self._virtual is not None:
            train_s = self._virtual.compute(
                reply.number, train_s=train_s, upload_bytes=reply.size or 0, samples=reply.samples
            )
        exchange = self._exchanges.get(reply.number)
        if exchange is None:  # the limit of the message has passed
            return
        message, now, call = exchange.message, self.now(), exchange.call
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
            self._close_exchange(exchange)
        elif self._virtual is None and (call.sum_request is None or reply.error is not None):
            self._deliver(exchange, answer)
        elif self._virtual is None:
            self._unsummed.setdefault((worker, call.number), []).append(exchange)
            call.unsummed += 1
            self._report(call)

    def _on_sum(self, worker: int, number: int, data: bytes | memoryview | None) -> None:
        """Hand over the replies whose updates are in the sum; the last of them has it."""
        exchanges = self._unsummed.pop((worker, number), [])
        for position, exchange in enumerate(exchanges, start=1):
            exchange.call.unsummed -= 1
            assert exchange.answer is not None
            is_last = position == len(exchanges)
            if exchange.call.is_detached:
                self._close_exchange(exchange)
            else:
                self._deliver(exchange, replace(exchange.answer, sum=data) if is_last else exchange.answer)

    def _on_worker_lost(self, worker: int, reason: str) -> None:
        self.lost_workers += 1
        loss = self._dispatcher.lose(worker)
        expired = loss.expired
        again = []
        for job in loss.jobs:
            exchange = self._exchanges.get(job.number)
            if exchange is None:
                continue
            if (
                len(loss.jobs) > 1
            ):  # any of them may be the cause: replies wait in the worker until they are sent
                job.is_suspect = True
                again.append(exchange)
            elif expired is not None:
                late = f"no reply within {expired.limit_s:g} s; its worker was ended"
                self._fail(exchange, ErrorCode.MESSAGE_UNAVAILABLE, late)
            else:
                self._fail(exchange, ErrorCode.CLIENT_LOST, reason)
        for key in [key for key in self._unsummed if key[0] == worker]:
            for exchange in self._unsummed.pop(key):  # their updates were in a sum of the worker
                exchange.call.unsummed -= 1
                exchange.answer = None
                again.append(exchange)
        self._dispatcher.add(again)
        without_state = f", and {len(loss.stateful)} clients have lost their state" if loss.stateful else ""
        repeated = f"{len(again)} messages are sent again" if again else "no message is sent again"
        self._observer.on_warning(f"{reason}. It was replaced; {repeated}{without_state}")

    # --- handing over -------------------------------------------------------------------------

    def _fail(self, exchange: Exchange, code: ErrorCode, reason: str) -> None:
        error = ReplyError(code, f"{exchange.message.client}: {reason}")
        self._deliver(exchange, ClientReply(request=exchange.message, round=exchange.round, error=error))

    def _deliver(self, exchange: Exchange, reply: ClientReply) -> None:
        """Hand *reply* to its call."""
        self._close_exchange(exchange)
        if self._virtual is not None and reply.timing is not None:
            timing = replace(reply.timing, sent_at=exchange.sent_at, replied_at=self.now())
            reply = replace(reply, timing=timing)
        if reply.error is not None:
            self.reject(reply, reply.error.reason)
        call = exchange.call
        call.done += 1
        call.failed += reply.error is not None
        if call.is_posted:
            self._posted[reply.request.message_id] = replace(
                reply, request=replace(reply.request, payload=_NO_PAYLOAD)
            )
            if len(self._posted) > MAX_UNCLAIMED_REPLIES:
                del self._posted[next(iter(self._posted))]
        elif self._is_deterministic:
            call.early[exchange.job.position] = reply
            while call.next_position in call.early:
                call.ready.append(call.early.pop(call.next_position))
                call.next_position += 1
        else:
            call.ready.append(reply)
        self._report(call)
        self._end_call(call)

    def _close_exchange(self, exchange: Exchange) -> None:
        """Remove the exchange, and free the payload after the last one of it."""
        del self._exchanges[exchange.job.number]
        exchange.placed.open_messages -= 1
        if not exchange.placed.open_messages:
            self._engine.release(exchange.placed.payload)

    def _end_call(self, call: Call) -> None:
        if call.done == call.total and call.spans is not None:
            call.spans.end()

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

    # --- state --------------------------------------------------------------------------------

    def _present(self) -> list[str]:
        return self._clients if self._virtual is None else self._virtual.present()

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _fail_engine(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._closed = self._closed or MessengerClosed(str(error))
