"""The `Messenger` of a simulated run: messages go to the workers of an engine, replies come back.

The thread that waits for a reply runs the exchange with the engine itself; no other thread is needed, and nothing
polls. If several threads wait, one of them does it, and the others wait for it. After the first `post`, a thread of the
messenger does it while no other thread waits.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    NO_FUNCTION,
    BadTask,
    ClientReply,
    ErrorCode,
    MessengerClosed,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_timing import ExchangeTiming
from fedbus.simulation.client_spans import CallSpans, ClientSpans
from fedbus.simulation.engine import (
    EngineFailed,
    Event,
    MessageBatch,
    MessageItem,
    Replies,
    SimulationEngine,
    WorkerLost,
    WorkerReply,
)
from fedbus.simulation.observer import SimulationObserver, SimulationProgress
from fedbus.simulation.scheduling import Job, Schedule

PROGRESS_S: Final = 0.1
"""The shortest time between two reports of progress."""
MAX_FAILURE_CHARS: Final = 500
MAX_SAMPLES: Final = 2**53
DEFAULT_TTL_S: Final = 3600.0

_NO_PAYLOAD: Final = Payload.pack(())


@dataclass(slots=True, eq=False)
class _PlacedMessages:
    """A payload in the engine, and how many of its messages have no reply."""

    payload: int
    open_messages: int


@dataclass(slots=True, eq=False)
class _Call:
    """The messages of one `send`, or one that was posted."""

    total: int = 0
    done: int = 0
    failed: int = 0
    kind: str = ""
    round: int = 0
    ready: deque[ClientReply] = field(default_factory=deque)
    early: dict[int, ClientReply] = field(default_factory=dict)
    """Replies that came before an earlier one, by position, if the order is fixed."""
    next_position: int = 0
    is_posted: bool = False
    spans: CallSpans | None = None


@dataclass(slots=True, eq=False)
class _Exchange:
    message: OutgoingMessage
    round: int
    call: _Call
    placed: _PlacedMessages
    job: Job


class SimulationMessenger:
    """The `Messenger` of one simulated run on the workers of *engine*, which is started.

    The clients are those with the names *clients*; all of them are present.
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
    ) -> None:
        self._engine = engine
        self._run = run
        self._plan = plan
        self._clients = clients
        self._indices = {client: index for index, client in enumerate(clients)}
        self._observer = observer
        self._spans = ClientSpans(run)
        self._is_deterministic = is_deterministic
        self._schedule = Schedule(engine.workers, in_order=is_deterministic)
        self._changed = threading.Condition(threading.RLock())
        self._is_pumping = False
        self._pump_thread: threading.Thread | None = None
        self._exchanges: dict[int, _Exchange] = {}
        self._next_number = 0
        self._posted: dict[str, ClientReply] = {}
        """Replies to posted messages, until they are taken or collected, by message id in order of arrival."""
        self._latest_round = 0
        self._tallies: dict[int, RoundTally] = {}
        self._closed: MessengerClosed | None = None
        self._last_progress = 0.0
        self.failure: BadTask | EngineFailed | None = None
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

    def now(self) -> float:
        return time.monotonic()

    def clients(self) -> list[str]:
        self._check_open()
        return list(self._clients)

    def failed_clients(self) -> dict[str, str]:
        self._check_open()
        return {}

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        del timeout_s  # no other client can join
        self._check_open()
        if len(self._clients) < count:
            raise NotEnoughClients(
                f"the run needs {count} clients, and the simulation has {len(self._clients)}. "
                f"Simulate at least {count} clients, or lower the minimum of the strategy"
            )
        return list(self._clients)

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        before = set(clients)
        self._wait_until(lambda: set(self._clients) != before, timeout_s)
        return list(self._clients)

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        call = _Call()
        deadline = None if timeout_s is None else self.now() + timeout_s
        self._post(messages, call)
        return self._receive(call, deadline, timeout_s)

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        ids = self._post(messages, _Call(is_posted=True))
        self._start_pump_thread()
        return ids

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        with self._changed:
            self._check_open()
            return [self._posted.pop(message_id) for message_id in message_ids if message_id in self._posted]

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        before = None if clients is None else set(clients)
        self._wait_until(
            lambda: bool(self._posted) or (before is not None and set(self._clients) != before), timeout_s
        )
        with self._changed:
            first = next(iter(self._posted), None)
            return None if first is None else self._posted.pop(first)

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        with self._changed:
            tally = self._tally(reply.round)
            if reply.timing is not None:
                tally.exchanges.append(reply.timing)
            if reply.metrics:
                tally.figures.setdefault(reply.client, {}).update(reply.metrics)
            phase = reply.request.kind.partition(".")[0]
            if phase == "train":
                tally.participants[reply.client] = max(0, min(samples, MAX_SAMPLES))
                tally.train_s[reply.client] = reply.timing.train_s if reply.timing else 0.0
            elif phase == "evaluate":
                tally.evaluated.add(reply.client)

    def reject(self, reply: ClientReply, reason: str) -> None:
        with self._changed:
            tally = self._tally(reply.round)
            text = reason.removeprefix(f"{reply.client}: ")[:MAX_FAILURE_CHARS]
            tally.failures[reply.client] = text
            if reply.request.kind.partition(".")[0] == "evaluate" and NO_FUNCTION not in reason:
                tally.evaluation_failures[reply.client] = text

    def tally(self, round_number: int) -> RoundTally:
        with self._changed:
            tally = self._tally(round_number)
            return RoundTally(
                participants=dict(tally.participants),
                failures=dict(tally.failures),
                evaluated=set(tally.evaluated),
                evaluation_failures=dict(tally.evaluation_failures),
                train_s=dict(tally.train_s),
                figures={client: dict(figures) for client, figures in tally.figures.items()},
                exchanges=list(tally.exchanges),
            )

    def close(self, reason: str) -> None:
        """End all current and later calls with MessengerClosed(*reason*)."""
        with self._changed:
            self._closed = self._closed or MessengerClosed(reason)
            self._changed.notify_all()
        self._engine.wake()

    # --- sending ------------------------------------------------------------------------------

    def _post(self, messages: Iterable[OutgoingMessage], call: _Call) -> list[str]:
        outgoing = list(messages)
        ids = [message.message_id for message in outgoing]
        if self._is_deterministic:  # replies have this order, as on the fleet
            outgoing.sort(key=lambda message: message.client)
        with self._changed:
            self._check_open()
            by_payload: dict[int, _PlacedMessages] = {}
            jobs = []
            for position, message in enumerate(outgoing):
                index = self._indices.get(message.client)
                self._latest_round = self._latest_round if message.round is None else message.round
                key = id(message.payload)
                placed = by_payload.get(key)
                if placed is None:
                    placed = by_payload[key] = _PlacedMessages(self._place(message.payload), 0)
                placed.open_messages += 1
                self._next_number += 1
                number = self._next_number
                job = Job(number, -1 if index is None else index, message.kind, position)
                exchange = _Exchange(message, self._latest_round, call, placed, job)
                self._exchanges[number] = exchange
                call.total += 1
                call.kind, call.round = message.kind, self._latest_round
                if index is None:
                    error = ReplyError(ErrorCode.CLIENT_LOST, f"{message.client}: there is no such client")
                    self._fail(exchange, error)
                else:
                    jobs.append(job)
            if outgoing:
                open_spans = self._spans.open_post if call.is_posted else self._spans.open_call
                call.spans = open_spans(round_number=call.round, kind=call.kind, total=call.total)
            self._schedule.add(jobs)
            if self._is_pumping:
                self._engine.wake()
            else:
                self._dispatch()
        return ids

    def _place(self, payload: Payload) -> int:
        try:
            return self._engine.place(payload)
        except EngineFailed as error:
            self._fail_engine(error)
            raise self._closed or MessengerClosed(str(error)) from error

    def _dispatch(self) -> None:
        """Give each worker its next messages. The caller has the lock, and no thread is in the engine."""
        for worker in range(self._engine.workers):
            batches: dict[tuple[object, ...], list[_Exchange]] = {}
            for job in self._schedule.take(worker):
                exchange = self._exchanges[job.number]
                message = exchange.message
                key = (
                    exchange.placed.payload,
                    message.kind,
                    exchange.round,
                    message.group_id,
                    message.ttl_s,
                )
                batches.setdefault(key, []).append(exchange)
            for exchanges in batches.values():
                first = exchanges[0].message
                items = [
                    MessageItem(one.job.number, one.job.client, one.message.message_id) for one in exchanges
                ]
                self._engine.submit(
                    worker,
                    MessageBatch(
                        items,
                        exchanges[0].placed.payload,
                        first.kind,
                        exchanges[0].round or None,
                        first.group_id,
                        DEFAULT_TTL_S if first.ttl_s is None else first.ttl_s,
                        first.created_at,
                    ),
                )

    # --- receiving ----------------------------------------------------------------------------

    def _receive(self, call: _Call, deadline: float | None, timeout_s: float | None) -> Iterator[ClientReply]:
        for left in range(call.total, 0, -1):
            if not call.ready:
                timeout = None if deadline is None else max(0.0, deadline - self.now())
                if not self._wait_until(lambda: bool(call.ready), timeout):
                    self._detach(call, timeout_s or 0.0)
            elif self._closed:
                raise self._closed
            if left == 1 and call.spans is not None:
                call.spans.link_current_span()
            yield call.ready.popleft()

    def _detach(self, call: _Call, timeout_s: float) -> None:
        """End the wait for the open messages of *call*. Their replies can be collected later."""
        with self._changed:
            late = _Call(is_posted=True)
            if call.spans is not None:
                call.spans.end()
            for exchange in [one for one in self._exchanges.values() if one.call is call]:
                exchange.call = late
                late.total += 1
                reason = f"{exchange.message.client}: no reply within {timeout_s:g} s"
                reply = ClientReply(
                    request=exchange.message,
                    round=exchange.round,
                    error=ReplyError(ErrorCode.NO_REPLY, reason),
                )
                self.reject(reply, reason)
                call.ready.append(reply)
        if late.total:
            self._start_pump_thread()

    def _wait_until(self, is_ready: Callable[[], bool], timeout_s: float | None) -> bool:
        """Exchange messages with the workers until *is_ready*. Return False if the time is over before.

        Raises:
            MessengerClosed: the run has ended.

        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._check_open()
                if is_ready():
                    return True
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                if self._is_pumping:
                    self._changed.wait(left_s)
                else:
                    self._pump(left_s)

    def _pump(self, timeout_s: float | None) -> None:
        """Wait once for events of the workers. The caller has the lock, which is released meanwhile."""
        self._is_pumping = True
        events: list[Event] = []
        try:
            self._dispatch()
            self._changed.release()
            try:
                events = self._engine.wait(timeout_s)
            finally:
                self._changed.acquire()
            for event in events:
                self._handle(event)
            self._dispatch()
        except (BadTask, EngineFailed) as error:
            self._fail_engine(error)
        finally:
            self._is_pumping = False
            self._changed.notify_all()

    def _start_pump_thread(self) -> None:
        """Start the thread that exchanges messages while no call waits for them, for messages that are posted."""
        with self._changed:
            if self._pump_thread is None:
                self._pump_thread = threading.Thread(
                    target=self._run_pump_thread, name="simulation messenger", daemon=True
                )
                self._pump_thread.start()
            self._changed.notify_all()

    def _run_pump_thread(self) -> None:
        with self._changed:
            while not self._closed:
                if self._is_pumping or not self._exchanges:
                    self._changed.wait()
                else:
                    self._pump(None)

    def _handle(self, event: Event) -> None:
        match event:
            case Replies(worker=worker):
                for reply, data in event.payloads():
                    self._schedule.finish(reply.number, worker, reply.seconds)
                    self._on_reply(worker, reply, data)
            case WorkerLost(worker=worker, reason=reason):
                self._on_worker_lost(worker, reason)

    def _on_reply(self, worker: int, reply: WorkerReply, data: memoryview | None) -> None:
        exchange = self._exchanges[reply.number]
        message, now = exchange.message, self.now()
        if exchange.call.spans is not None:
            exchange.call.spans.add_reply(
                exchange.job.position, message.client, reply.seconds, reply.error, worker=worker
            )
        client_reply = ClientReply(
            request=message,
            round=exchange.round,
            message_id=f"{message.message_id}-reply",
            created_at=reply.created_at,
            ttl_s=reply.ttl_s,
            data=data,
            error=reply.error,
            metrics=reply.metrics,
            timing=ExchangeTiming(message.client, now - reply.seconds, now, reply.train_s),
        )
        self._deliver(exchange, client_reply)

    def _on_worker_lost(self, worker: int, reason: str) -> None:
        self.lost_workers += 1
        lost = self._schedule.lose(worker)
        self._observer.on_warning(
            f"{reason}. Failed: {len(lost)} messages of its clients. It was replaced, and its clients begin "
            "without state"
        )
        for job in lost:
            exchange = self._exchanges[job.number]
            self._fail(exchange, ReplyError(ErrorCode.CLIENT_LOST, f"{exchange.message.client}: {reason}"))

    def _fail(self, exchange: _Exchange, error: ReplyError) -> None:
        self._deliver(exchange, ClientReply(request=exchange.message, round=exchange.round, error=error))

    def _deliver(self, exchange: _Exchange, reply: ClientReply) -> None:
        """Hand *reply* to its call, and free the payload after the last reply to it."""
        del self._exchanges[exchange.job.number]
        exchange.placed.open_messages -= 1
        if not exchange.placed.open_messages:
            self._engine.release(exchange.placed.payload)
        if reply.error is not None:
            self.reject(reply, reply.error.reason)
        call = exchange.call
        call.done += 1
        call.failed += reply.error is not None
        if call.spans is not None and call.done == call.total:
            call.spans.end()
        if call.is_posted:
            self._posted[reply.request.message_id] = replace(
                reply, request=replace(reply.request, payload=_NO_PAYLOAD)
            )
        elif self._is_deterministic:
            call.early[exchange.job.position] = reply
            while call.next_position in call.early:
                call.ready.append(call.early.pop(call.next_position))
                call.next_position += 1
        else:
            call.ready.append(reply)
        self._report(call)

    def _report(self, call: _Call) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_S or call.done == call.total:
            self._last_progress = now
            self._observer.on_progress(
                SimulationProgress(
                    round=call.round, kind=call.kind, done=call.done, failed=call.failed, total=call.total
                )
            )

    # --- state --------------------------------------------------------------------------------

    def _tally(self, round_number: int) -> RoundTally:
        tally = self._tallies.get(round_number)
        if tally is None:
            tally = self._tallies[round_number] = RoundTally()
        return tally

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _fail_engine(self, error: BadTask | EngineFailed) -> None:
        self.failure = self.failure or error
        self._closed = self._closed or MessengerClosed(str(error))
