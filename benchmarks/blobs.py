"""Measure the transfer of a round's weights as blobs and as bare NATS messages, to each client and back.

    python -m benchmarks.blobs [--clients 4] [--mib 0.25 10] [--repeats 7] [--object-store]

One process is the server, and each client is a separate process, all on one nats-server. A round sends that many
MiB to every client and receives as many from each. The methods run alternately in every repetition, so that load on
the machine affects all of them. The output is the median of each, and its ratio to bare NATS. Bare NATS publishes the
same chunks without window, digest and repair: it is the lower bound, not a usable protocol.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.on_bare_nats import publish_chunks
from fedbus.bus.blobs import Blobs
from fedbus.contracts.identifiers import federation_id
from fedbus.contracts.model import BlobRef

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import nats_server

FED = federation_id("bench")
MIB = 1024**2

Round = Callable[[], Awaitable[None]]


# --- a client: acts on messages on bench.<method>, and reports when it is done ---------------------------


async def client(url: str, number: int, mib: float) -> None:
    size = round(mib * MIB)
    weights = os.urandom(size)
    buffer = memoryview(bytearray(size))
    connection = await nats.connect(url)
    ended = asyncio.Event()
    async with Blobs.open(connection, FED, f"client-{number}") as blobs, AsyncExitStack() as offers:

        async def by_blob(message: Msg) -> None:
            await blobs.fetch(BlobRef.model_validate_json(message.data), buffer)
            await offers.aclose()
            offer = await offers.enter_async_context(await blobs.offer(weights))
            await connection.publish("bench.done", offer.ref.model_dump_json().encode())

        async def by_store(message: Msg) -> None:
            store = await connection.jetstream().object_store("bench")
            await store.get(message.data.decode())
            await store.put(f"up-{number}", weights)
            await connection.publish("bench.done", f"up-{number}".encode())

        received_bytes = 0

        async def bare(message: Msg) -> None:
            nonlocal received_bytes
            buffer[received_bytes : received_bytes + len(message.data)] = message.data
            received_bytes += len(message.data)
            if received_bytes == size:
                received_bytes = 0
                await publish_chunks(connection, "bench.up", memoryview(weights))

        async def end(_: Msg) -> None:
            ended.set()

        await connection.subscribe("bench.blob", cb=by_blob)
        await connection.subscribe("bench.store", cb=by_store)
        await connection.subscribe("bench.down", cb=bare)
        await connection.subscribe("bench.end", cb=end)
        await connection.flush()
        await connection.publish("bench.ready")
        await ended.wait()
    await connection.close()


# --- the server: one round with each method ------------------------------------------------------


class BlobServer:
    def __init__(self, connection: Client, blobs: Blobs, clients: int, size: int) -> None:
        self._connection = connection
        self._blobs = blobs
        self._clients = clients
        self._weights = os.urandom(size)
        self._buffers = [memoryview(bytearray(size)) for _ in range(clients)]
        self._done: asyncio.Queue[bytes] = asyncio.Queue()
        self._received_bytes = 0
        self._all_received = asyncio.Event()

    async def subscribe(self) -> None:
        async def done(message: Msg) -> None:
            self._done.put_nowait(message.data)

        async def up(message: Msg) -> None:
            self._received_bytes += len(message.data)
            if self._received_bytes == self._clients * len(self._weights):
                self._all_received.set()

        await self._connection.subscribe("bench.done", cb=done)
        await self._connection.subscribe("bench.up", cb=up)

    async def by_blob(self) -> None:
        async with await self._blobs.offer(self._weights, receivers=self._clients) as offer:
            await self._connection.publish("bench.blob", offer.ref.model_dump_json().encode())
            async with asyncio.TaskGroup() as fetches:
                for buffer in self._buffers:
                    ref = BlobRef.model_validate_json(await self._done.get())
                    fetches.create_task(self._blobs.fetch(ref, buffer))

    async def by_bare_nats(self) -> None:
        self._received_bytes = 0
        self._all_received.clear()
        await publish_chunks(self._connection, "bench.down", memoryview(self._weights))
        await self._all_received.wait()

    async def by_store(self) -> None:
        store = await self._connection.jetstream().object_store("bench")
        await store.put("down", self._weights)
        await self._connection.publish("bench.store", b"down")
        for _ in range(self._clients):
            await store.get((await self._done.get()).decode())


async def measure_medians(methods: dict[str, Round], repeats: int) -> dict[str, float]:
    """Run the methods alternately, and return the median of each in milliseconds."""
    for run_round in methods.values():
        await run_round()
    times_ms: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, run_round in methods.items():
            start = time.perf_counter()
            await run_round()
            times_ms[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(times) for name, times in times_ms.items()}


@asynccontextmanager
async def clients_running(connection: Client, url: str, count: int, mib: float) -> AsyncIterator[None]:
    ready = asyncio.Semaphore(0)

    async def on_ready(_: Msg) -> None:
        ready.release()

    subscription = await connection.subscribe("bench.ready", cb=on_ready)
    command = [sys.executable, "-m", "benchmarks.blobs", "--url", url, "--mib", str(mib), "--client"]
    processes = [await asyncio.create_subprocess_exec(*command, str(number)) for number in range(count)]
    for _ in processes:
        await ready.acquire()
    try:
        yield
    finally:
        await connection.publish("bench.end")
        for process in processes:
            await process.wait()
        await subscription.unsubscribe()


async def run_case(url: str, mib: float, clients: int, repeats: int, *, with_store: bool) -> None:
    connection = await nats.connect(url)
    size = round(mib * MIB)
    async with (
        clients_running(connection, url, clients, mib),
        Blobs.open(connection, FED, "server") as blobs,
    ):
        server = BlobServer(connection, blobs, clients, size)
        await server.subscribe()
        methods: dict[str, Round] = {"bare NATS": server.by_bare_nats, "blobs": server.by_blob}
        if with_store:
            await connection.jetstream().create_object_store("bench")
            methods["object store"] = server.by_store
        medians = await measure_medians(methods, repeats)
    for name, median in medians.items():
        ratio = median / medians["bare NATS"]
        print(
            f"{clients} × {mib:>6g} MiB to each client and back   {name:<14}{median:>10.1f} ms{ratio:>8.2f} ×"
        )
    await connection.close()


async def measure_round_trip(url: str, repeats: int) -> None:
    """Compare a blob of one small chunk with a request and reply of the same size."""
    client, server = await nats.connect(url), await nats.connect(url)
    weights = os.urandom(16 * 1024)

    async def respond(message: Msg) -> None:
        await message.respond(weights)

    await server.subscribe("bench.request", cb=respond)
    async with Blobs.open(client, FED, "client") as receiver, Blobs.open(server, FED, "server") as sender:
        offer = await sender.offer(weights)

        async def by_blob() -> None:
            await receiver.fetch(offer.ref)

        async def bare() -> None:
            await client.request("bench.request")

        medians = await measure_medians({"bare NATS": bare, "blobs": by_blob}, 20 * repeats)
    for name, median in medians.items():
        print(
            f"one chunk of 16 KiB            {name:<14}{median:>10.2f} ms{median / medians['bare NATS']:>8.2f} ×"
        )
    await client.close()
    await server.close()


async def server(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with nats_server(Path(directory)) as broker:
            await measure_round_trip(broker.url, options.repeats)
            for mib in options.mib:
                with_store = options.object_store and mib == options.mib[-1]
                await run_case(broker.url, mib, options.clients, options.repeats, with_store=with_store)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--mib", type=float, nargs="+", default=[0.25, 10])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--object-store", action="store_true")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is None:
        asyncio.run(server(options))
    else:
        asyncio.run(client(options.url, options.client, options.mib[0]))


if __name__ == "__main__":
    main()
