"""One worker as a Ray actor: orders as method calls, events as a stream of results.

The payload of an order comes from the object store, which each machine of the cluster maps once for all its workers.
The payloads of replies are NumPy arrays, which Ray takes out of the pickled event.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from fedbus.simulation.engine import Event, Order, Replies, SumTaken, WorkerJob
from fedbus.simulation.ray.task_archive import TaskCopy
from fedbus.simulation.worker import SimulationWorker
from fedbus.simulation.worker_setup import import_app

JOIN_BYTES: Final = 1024**2
"""The size of the payloads of an event up to which they are copied into one buffer: many small ones cost more."""


@dataclass(frozen=True)
class ActorStarted:
    """A worker has imported the app, or *problem* is why not."""

    host: str
    pid: int
    problem: str = ""


class WorkerActor:
    """Worker *number*. Ray calls its methods one after the other, in the order of the engine's calls."""

    def __init__(self, number: int, job: WorkerJob, archive: bytes) -> None:
        self._copy = TaskCopy(job.task, archive)
        self._number = number
        self._job = replace(job, task=self._copy.task)
        self._worker: SimulationWorker | None = None

    def start(self) -> ActorStarted:
        """Import the app."""
        problem = import_app(self._job.task)
        if not problem:
            self._worker = SimulationWorker(self._number, self._job)
        return ActorStarted(socket.gethostname(), os.getpid(), problem)

    def handle(self, order: Order, data: "bytes | np.ndarray[Any, Any]") -> Iterator[Event]:
        """Carry out *order* with the payload *data*. Yields events as soon as they are worth sending."""
        assert self._worker is not None, "the actor is not started"
        for event in self._worker.handle(order, data if isinstance(data, bytes) else data.data):
            if isinstance(event, Replies | SumTaken):
                yield replace(event, buffers=pack_buffers(event.buffers))
            else:
                yield event

    def close(self) -> None:
        """Close all sessions."""
        if self._worker is not None:
            self._worker.close()
        self._copy.remove()


def pack_buffers(buffers: Any) -> list[Any]:
    """Return *buffers* as arrays, which Ray does not pickle: one if they are small, else one for each."""
    if sum(map(len, buffers)) <= JOIN_BYTES:
        return [np.frombuffer(b"".join(buffers), np.uint8)] if buffers else []
    return [np.frombuffer(buffer, np.uint8) for buffer in buffers]


def unpack_buffers(arrays: Any) -> list[memoryview]:
    """Return the buffers of `pack_buffers`, which stay in the memory of the object store."""
    return [array.data for array in arrays]
