"""The `Messenger` of a simulated run: messages go to the workers of an engine, replies come back.

    post, send ──▶ `OpenExchanges` ──▶ `WorkerLoop` ──▶ `Dispatcher` ──▶ engine
    replies    ◀── `ReplyDelivery` ◀── `WorkerLoop` ◀──────────────────  engine, or the virtual clock

With a profile, the clock is virtual (`VirtualTime`): replies are handed over in the order of their virtual arrival.
"""

import math
import threading
import time
from collections.abc import Collection, Iterable, Iterator

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import ClientReply, ErrorCode, MessengerClosed, NotEnoughClients, OutgoingMessage
from fedbus.learning.payload import Payload
from fedbus.learning.run_messenger import RunMessenger
from fedbus.simulation.client_spans import ClientSpans
from fedbus.simulation.dispatcher import Dispatcher
from fedbus.simulation.engine import EngineFailed, SimulationEngine
from fedbus.simulation.exchanges import Call, Exchange, PlacedPayload
from fedbus.simulation.observer import SimulationObserver
from fedbus.simulation.open_exchanges import OpenExchanges
from fedbus.simulation.reply_delivery import ReplyDelivery
from fedbus.simulation.virtual_time import VirtualTime
from fedbus.simulation.worker_loop import WorkerLoop


class SimulationMessenger(RunMessenger):
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
        super().__init__(run, plan, threading.Condition(threading.RLock()))
        self._engine = engine
        self._clients = clients
        self._spans = ClientSpans(run)
        self._is_deterministic = is_deterministic
        self._adds_updates = adds_updates and not is_deterministic and virtual is None
        self._virtual = virtual
        self._exchanges = OpenExchanges(engine, clients)
        dispatcher = Dispatcher(
            engine, self._exchanges.by_number, in_order=is_deterministic, has_time_limits=virtual is None
        )
        self._delivery = ReplyDelivery(
            self._exchanges,
            dispatcher,
            observer=observer,
            now=self.now,
            virtual=virtual,
            in_order=is_deterministic,
            reject=self.reject,
        )
        self._loop = WorkerLoop(
            engine,
            dispatcher,
            self._delivery,
            changed=self._changed,
            now=self.now,
            virtual=virtual,
            check_open=self._check_open,
            fail=self._fail_engine,
        )
        self.failure: Exception | None = None
        """Why the engine ended; None if it did not."""

    @property
    def lost_workers(self) -> int:
        """Workers that died, and were replaced."""
        return self._delivery.lost_workers

    # --- `fedbus.learning.library.Messenger` --------------------------------------------------

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
        if not self._loop.wait_until(lambda: len(self._present()) >= count, limit_s, watches_presence=True):
            raise NotEnoughClients(
                f"the run waited for {count} clients (limit {limit_s:g} s of virtual time). Present: "
                f"{len(self._present())} of {len(self._clients)}. The profile makes the others absent"
            )
        return self.clients()

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        before = set(clients)
        self._loop.wait_until(lambda: set(self._present()) != before, timeout_s, watches_presence=True)
        return self.clients()

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        deadline = None if timeout_s is None else self.now() + timeout_s
        call, _ = self._post(messages, is_posted=False)
        return self._receive(call, deadline, timeout_s)

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        _, ids = self._post(messages, is_posted=True)
        self._loop.start_thread()
        return ids

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        """Return the replies that have arrived. A virtual clock moves to the next arrival if there is none yet."""
        ids, posted = list(message_ids), self._delivery.posted
        if self._virtual is not None and self._exchanges:
            count = len(self._exchanges)
            self._loop.wait_until(
                lambda: any(one in posted for one in ids) or len(self._exchanges) < count, math.inf
            )
        with self._changed:
            self._check_open()
            return posted.collect(ids)

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        before = None if clients is None else set(clients)
        self._loop.wait_until(
            lambda: bool(self._delivery.posted) or (before is not None and set(self._present()) != before),
            timeout_s,
            watches_presence=before is not None,
        )
        with self._changed:
            return self._delivery.posted.take()

    def close(self, reason: str) -> None:
        """End all current and later calls with MessengerClosed(*reason*)."""
        self._end(reason)
        self._engine.wake()

    def join(self) -> None:
        """Wait for the thread of the messenger, after `close`. Then no thread is in the engine."""
        self._loop.join()

    # --- sending ------------------------------------------------------------------------------

    def _post(self, messages: Iterable[OutgoingMessage], *, is_posted: bool) -> tuple[Call, list[str]]:
        outgoing = list(messages)
        ids = [message.message_id for message in outgoing]
        if self._is_deterministic:  # replies have this order, as on the fleet
            outgoing.sort(key=lambda message: message.client)
        with self._changed:
            self._check_open()
            payloads = {id(message.payload): message.payload for message in outgoing}
            placed = {key: self._place(payload) for key, payload in payloads.items()}
            call = self._exchanges.open_call(len(outgoing), is_posted=is_posted)
            exchanges = [
                self._exchanges.open(
                    message,
                    call,
                    placed[id(message.payload)],
                    position=position,
                    round_number=self._round_of(message),
                    limit_s=self._limit_s(message),
                    sent_at=self.now(),
                )
                for position, message in enumerate(outgoing)
            ]
            if outgoing:
                call.kind, call.round = outgoing[-1].kind, self._latest_round
                open_spans = self._spans.open_post if is_posted else self._spans.open_call
                call.spans = open_spans(round_number=call.round, kind=call.kind, total=call.total)
            received = [one for one in exchanges if self._begin(one)]
            self._delivery.end_spans(call)
            self._loop.add(received)
        return call, ids

    def _place(self, payload: Payload) -> PlacedPayload:
        try:
            return self._exchanges.place(payload)
        except EngineFailed as error:
            self._fail_engine(error)
            raise self._closed or MessengerClosed(str(error)) from error

    def _begin(self, exchange: Exchange) -> bool:
        """Begin the exchange. Return whether a worker has to answer the message."""
        client = exchange.message.client
        if exchange.job.client < 0:
            self._delivery.fail(exchange, ErrorCode.CLIENT_LOST, "there is no such client")
            return False
        if self._virtual is None:
            return True
        if client not in self._present():
            self._delivery.fail(exchange, ErrorCode.CLIENT_LOST, "the client is not connected")
            return False
        return self._virtual.send(
            exchange.job.number,
            client,
            exchange.message.kind,
            download_bytes=exchange.placed.size_bytes,
            limit_s=exchange.limit_s,
        )

    def _receive(self, call: Call, deadline: float | None, timeout_s: float | None) -> Iterator[ClientReply]:
        for left in range(call.total, 0, -1):
            if not call.ready:
                left_s = None if deadline is None else max(0.0, deadline - self.now())
                if not self._loop.wait_until(lambda: bool(call.ready), left_s):
                    self._detach(call, timeout_s or 0.0)
            elif self._closed:
                raise self._closed
            if left == 1 and call.spans is not None:
                call.spans.link_current_span()
            yield call.ready.popleft()

    def _detach(self, call: Call, timeout_s: float) -> None:
        with self._changed:
            has_open_messages = self._delivery.detach(call, timeout_s)
        if has_open_messages:
            self._loop.start_thread()

    # --- state --------------------------------------------------------------------------------

    def _present(self) -> list[str]:
        return self._clients if self._virtual is None else self._virtual.present()

    def _fail_engine(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._end(str(error))
