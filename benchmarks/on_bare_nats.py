"""Runs the lower bound: the same number of bytes over bare NATS, published once to all clients, and back from each.

There is no envelope, digest, window, storage or training. Each client is a separate process:
``python -m benchmarks.on_bare_nats URL SIZE``.
"""

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import nats
import numpy as np
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.rounds import Case
from fedbus.agents.common.child_process import ChildProcess, exit_when_parent_dies, module_command
from fedbus.app.local.nats_server import embedded_nats
from fedbus.bus.blobs import CHUNK_BYTES

WARMUP_ROUNDS: Final = 2
READY_S: Final = 60.0
DOWN, UP, READY = "bench.down", "bench.up", "bench.ready"


async def run_rounds(case: Case, count: int, directory: Path) -> list[float]:
    """Start everything, run *count* rounds, and return their seconds."""
    command = module_command("benchmarks.on_bare_nats")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(embedded_nats(directory / "nats"))
        connection = await nats.connect(server.url, pending_size=64 * 1024**2)
        stack.push_async_callback(connection.close)
        bare_server = BareNatsServer(connection, case)
        await bare_server.subscribe()
        for number in range(case.clients):
            log = directory / f"client-{number}.log"
            child = ChildProcess("client", *command, server.url, str(case.size_bytes), output=log)
            await stack.enter_async_context(child)
        async with asyncio.timeout(READY_S):
            await bare_server.wait_for_clients()
        return [await bare_server.run_round() for _ in range(WARMUP_ROUNDS + count)][WARMUP_ROUNDS:]


class BareNatsServer:
    """The server side: publishes the weights, and counts the bytes that return."""

    def __init__(self, connection: Client, case: Case) -> None:
        self._connection = connection
        self._weights = _weights(case.size_bytes)
        self._expected = case.clients * case.size_bytes
        self._clients = case.clients
        self._received_bytes = 0
        self._all_received = asyncio.Event()
        self._ready = asyncio.Semaphore(0)

    async def subscribe(self) -> None:
        async def up(message: Msg) -> None:
            self._received_bytes += len(message.data)
            if self._received_bytes == self._expected:
                self._all_received.set()

        async def ready(_: Msg) -> None:
            self._ready.release()

        await self._connection.subscribe(UP, cb=up)
        await self._connection.subscribe(READY, cb=ready)
        await self._connection.flush()

    async def wait_for_clients(self) -> None:
        for _ in range(self._clients):
            await self._ready.acquire()

    async def run_round(self) -> float:
        self._received_bytes = 0
        self._all_received.clear()
        start = time.perf_counter()
        await publish_chunks(self._connection, DOWN, self._weights)
        await self._all_received.wait()
        return time.perf_counter() - start


async def _client(url: str, size_bytes: int) -> None:
    connection = await nats.connect(url, pending_size=64 * 1024**2)
    weights, received_bytes = _weights(size_bytes), 0

    async def down(message: Msg) -> None:
        nonlocal received_bytes
        received_bytes += len(message.data)
        if received_bytes == size_bytes:
            received_bytes = 0
            await publish_chunks(connection, UP, weights)

    await connection.subscribe(DOWN, cb=down)
    await connection.flush()
    await connection.publish(READY)
    await asyncio.Event().wait()


def _weights(size_bytes: int) -> bytes:
    return np.random.default_rng(1).bytes(size_bytes)


async def publish_chunks(connection: Client, subject: str, weights: bytes | memoryview) -> None:
    """Publish *weights* in chunks of the size of a blob's."""
    for start in range(0, len(weights), CHUNK_BYTES):
        await connection.publish(subject, bytes(weights[start : start + CHUNK_BYTES]))


if __name__ == "__main__":
    exit_when_parent_dies()
    asyncio.run(_client(sys.argv[1], int(sys.argv[2])))
