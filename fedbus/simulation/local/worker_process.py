"""The process of one worker: orders from a socket to the `SimulationWorker`, and its events back."""

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedbus.simulation.engine import (
    Event,
    MessageBatch,
    ReleasePayload,
    Replies,
    SumTaken,
    WorkerJob,
    WorkerStarted,
)
from fedbus.simulation.local import frames
from fedbus.simulation.local.frames import FrameReader, PeerClosed
from fedbus.simulation.local.shared_memory import map_shared
from fedbus.simulation.worker import SimulationWorker


@dataclass(frozen=True, slots=True)
class PlacePayload:
    """A payload for this worker: its bytes if it is small, else a file descriptor comes with it."""

    payload: int
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class CloseWorker:
    """Close all sessions, and end."""


def run(sock: socket.socket, number: int, job: WorkerJob) -> None:
    """Handle orders until the engine ends the worker, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine ends its workers
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    try:
        process = _WorkerProcess(sock, SimulationWorker(number, job))
        process.send(WorkerStarted(number))
        process.serve()
    except PeerClosed:
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _WorkerProcess:
    def __init__(self, sock: socket.socket, worker: SimulationWorker) -> None:
        self._sock = sock
        self._worker = worker
        self._reader = FrameReader(sock)
        self._payloads: dict[int, bytes | memoryview] = {}

    def serve(self) -> None:
        while True:
            order, _ = self._reader.read() or (CloseWorker(), None)
            match order:
                case CloseWorker():
                    self._worker.close()
                    return
                case PlacePayload(payload=payload, data=data):
                    self._payloads[payload] = (
                        map_shared(self._reader.descriptors.pop(0)) if data is None else data
                    )
                case _:
                    content = self._payloads[order.payload] if isinstance(order, MessageBatch) else b""
                    for event in self._worker.handle(order, content):
                        self.send(event)
                    if isinstance(order, ReleasePayload):
                        self._payloads.pop(order.payload, None)

    def send(self, event: Event) -> None:
        """Send an event. The payloads of the replies follow it, and are not pickled."""
        buffers: Sequence[bytes | memoryview] = ()
        if isinstance(event, Replies | SumTaken):
            buffers = event.buffers
            event = replace(event, buffers=())
        frames.send(self._sock, frames.dump(event, buffers))
