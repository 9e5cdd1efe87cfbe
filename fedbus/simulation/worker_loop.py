"""The exchange with the workers of an engine, in the threads that wait for it."""

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from fedbus.learning.library import MessengerClosed
from fedbus.simulation.dispatcher import Dispatcher
from fedbus.simulation.engine import SimulationEngine
from fedbus.simulation.exchanges import Exchange
from fedbus.simulation.reply_delivery import ReplyDelivery
from fedbus.simulation.virtual_time import VirtualTime


class WorkerLoop:
    """Gives messages to the workers, and events of the workers and of the virtual clock to *delivery*.

    The thread that waits for a reply runs it; no other thread is needed, and nothing polls. If several threads wait,
    one of them does it, and the others wait for it. After `start_thread`, a thread of its own does it while no other
    thread waits.

    *changed* is the lock of the messenger. *check_open* raises MessengerClosed after the end of the run, and *fail*
    ends the run because of an error of the engine.
    """

    def __init__(
        self,
        engine: SimulationEngine,
        dispatcher: Dispatcher,
        delivery: ReplyDelivery,
        *,
        changed: threading.Condition,
        now: Callable[[], float],
        virtual: VirtualTime | None,
        check_open: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._changed = changed
        self._now = now
        self._virtual = virtual
        self._check_open = check_open
        self._fail = fail
        self._is_pumping = False
        self._thread: threading.Thread | None = None

    def add(self, exchanges: Iterable[Exchange]) -> None:
        """Give messages to the workers. The caller has the lock."""
        self._dispatcher.add(exchanges)
        if self._is_pumping:
            self._engine.wake()
        else:
            self._dispatcher.dispatch()

    def wait_until(
        self, is_ready: Callable[[], bool], timeout_s: float | None, *, watches_presence: bool = False
    ) -> bool:
        """Exchange messages with the workers until *is_ready*. Return False if the time is over before.

        With *watches_presence*, a virtual clock stops when clients come or go.

        Raises:
            MessengerClosed: the run has ended.

        """
        deadline = math.inf if timeout_s is None else self._now() + timeout_s
        with self._changed:
            while True:
                self._check_open()
                if is_ready():
                    return True
                left_s = deadline - self._now()
                if left_s <= 0:
                    return False
                if self._is_pumping:
                    self._changed.wait(left_s if self._virtual is None and left_s < math.inf else None)
                elif self._virtual is None:
                    self._pump(left_s)
                elif not self._advance(self._virtual, deadline, watches_presence=watches_presence):
                    return False

    def start_thread(self) -> None:
        """Start the thread that exchanges messages while no call waits for them, for messages that are posted."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run_thread, name="simulation messenger", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread. Then no thread is in the engine."""
        if self._thread is not None:
            self._thread.join()

    def _advance(self, virtual: VirtualTime, deadline: float, *, watches_presence: bool) -> bool:
        """Move the virtual clock by one event, or wait for workers. Return whether anything can happen."""
        until = min(deadline, virtual.next_presence_change()) if watches_presence else deadline
        end = virtual.advance(until)
        if end is not None:
            self._delivery.end_transit(end)
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
                self._delivery.handle(event)
            self._dispatcher.dispatch()
        except Exception as error:  # noqa: BLE001 - the run ends with it, in the thread of the simulation
            self._fail(error)
        finally:
            self._is_pumping = False
            self._changed.notify_all()

    def _run_thread(self) -> None:
        with suppress(MessengerClosed), self._changed:
            while True:
                self._check_open()
                if self._is_pumping or not self._delivery.exchanges.has_unanswered:
                    self._changed.wait()
                else:
                    self._pump(math.inf)
