"""An engine whose workers are in this process, one after the other; `lose` ends one."""

from collections import deque
from collections.abc import Callable

from fedbus.learning.payload import Payload
from fedbus.simulation.engine import Event, MessageBatch, Order, WorkerJob, WorkerLost, WorkerStarted
from fedbus.simulation.worker import SimulationWorker


class InProcessEngine:
    def __init__(self, job: WorkerJob, *, workers: int = 2) -> None:
        self._job = job
        self._workers = [SimulationWorker(number, job) for number in range(workers)]
        self._events: deque[Event] = deque(WorkerStarted(number) for number in range(workers))
        self._payloads: dict[int, bytes] = {}
        self.orders: list[tuple[int, Order]] = []
        self.before_handling: Callable[[int, Order], bool] = lambda _worker, _order: True
        """Returns whether the worker handles the order; else it dies."""
        self.released: list[int] = []

    @property
    def workers(self) -> int:
        return len(self._workers)

    def start(self) -> None: ...

    def place(self, payload: Payload) -> int:
        number = len(self._payloads) + 1
        self._payloads[number] = payload.to_bytes()
        return number

    def release(self, payload: int) -> None:
        self.released.append(payload)

    def submit(self, worker: int, order: Order) -> None:
        self.orders.append((worker, order))
        if not self.before_handling(worker, order):
            self.lose(worker, "worker died")
            return
        data = self._payloads[order.payload] if isinstance(order, MessageBatch) else b""
        self._events.extend(self._workers[worker].handle(order, memoryview(data)))

    def lose(self, worker: int, reason: str) -> None:
        self._workers[worker] = SimulationWorker(worker, self._job)
        self._events += [WorkerLost(worker, reason), WorkerStarted(worker)]

    def wait(self, timeout_s: float | None) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        assert events or timeout_s is not None, "nothing can happen any more"
        return events

    def kill(self, worker: int) -> None:
        self.lose(worker, "killed")

    def wake(self) -> None: ...

    def processes(self) -> list[int]:
        return []

    def close(self, *, at_once: bool = False) -> None:
        for worker in self._workers:
            worker.close()

    def batches(self) -> list[tuple[int, MessageBatch]]:
        return [(worker, order) for worker, order in self.orders if isinstance(order, MessageBatch)]
