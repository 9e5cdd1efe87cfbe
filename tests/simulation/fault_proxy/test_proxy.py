"""The fault proxy on real sockets, and between a bus connection and a real nats-server."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from nats.errors import TimeoutError as NatsTimeoutError
from support import NatsServer, eventually
from support.trusted_bus import FED, trusted_bus

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import AccessDenied
from fedbus.common.retry import retry
from fedbus.contracts.identifiers import FederationId
from fedbus.simulation.fault_proxy.link import MAX_IN_FLIGHT_BYTES
from fedbus.simulation.fault_proxy.proxy import FaultProxy, fault_proxy
from fedbus.simulation.profiles.conditions import DeviceConditions
from fedbus.simulation.profiles.schema import Group

HOST = "127.0.0.1"
ENDED = (ConnectionResetError, asyncio.IncompleteReadError)
MAX_TRIALS = 20
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def device(group: Mapping[str, Any], *, seed: int = 0) -> DeviceConditions:
    return DeviceConditions("c1", Group.model_validate(group), seed)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def proxied(
    group: Mapping[str, Any], handler: Handler = echo, *, seed: int = 0
) -> AsyncIterator[FaultProxy]:
    server = await asyncio.start_server(handler, HOST, 0)
    address = server.sockets[0].getsockname()
    listener = socket.create_server((HOST, 0))
    try:
        async with fault_proxy(device(group, seed=seed), address, listener) as proxy:
            yield proxy
    finally:
        server.close()


async def connect(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(HOST, proxy.port)


async def round_trip(proxy: FaultProxy, data: bytes) -> bytes:
    reader, writer = await connect(proxy)
    try:
        writer.write(data)
        return await reader.readexactly(len(data))
    finally:
        writer.close()


async def fastest_s(action: Callable[[], Awaitable[object]], limit_s: float) -> float:
    """The shortest duration of *action*, which is repeated while all are longer than *limit_s*.

    A busy machine delays some of them; a fault of the proxy delays all.
    """
    durations: list[float] = []
    while len(durations) < MAX_TRIALS and min(durations, default=limit_s) >= limit_s:
        start = time.monotonic()
        await action()
        durations.append(time.monotonic() - start)
    return min(durations)


async def test_bytes_pass_unchanged() -> None:
    data = bytes(range(256)) * 8192
    async with proxied({}) as proxy:
        assert await round_trip(proxy, data) == data


async def test_bytes_keep_their_order_under_all_conditions() -> None:
    group = {
        "latency": {"distribution": "uniform", "min-s": 0, "max-s": 0.05},
        "loss": {"probability": 0.3, "retransmit-s": 0.02},
        "bandwidth": 200,
    }
    async with proxied(group) as proxy:
        reader, writer = await connect(proxy)
        for number in range(20):
            writer.write(bytes([number]) * 1000)
            await asyncio.sleep(0.03)  # a new burst
        received = await reader.readexactly(20_000)
        writer.close()
    assert received == b"".join(bytes([number]) * 1000 for number in range(20))


async def test_latency_delays_each_direction() -> None:
    async with proxied({"latency": 0.1}) as proxy:
        assert 0.2 <= await fastest_s(lambda: round_trip(proxy, b"ping"), 1.0) < 1


async def test_bandwidth_limits_the_rate() -> None:
    async with proxied({"bandwidth": {"down-mbit-s": 8}}) as proxy:
        assert 0.29 <= await fastest_s(lambda: round_trip(proxy, bytes(300_000)), 1.5) < 1.5


async def test_connections_share_the_bandwidth() -> None:
    async with proxied({"bandwidth": {"up-mbit-s": 8}}) as proxy:

        async def three_at_once() -> None:
            await asyncio.gather(*(round_trip(proxy, bytes(100_000)) for _ in range(3)))

        assert 0.29 <= await fastest_s(three_at_once, 1.5) < 1.5


async def test_small_message_does_not_wait_for_a_large_one() -> None:
    async with proxied({"bandwidth": {"up-mbit-s": 8}}) as proxy:
        large = asyncio.create_task(round_trip(proxy, bytes(30_000_000)))  # it takes 30 s
        await asyncio.sleep(0.1)
        await round_trip(proxy, b"heartbeat")
        assert not large.done()
        large.cancel()
        await asyncio.wait([large])


async def test_lost_burst_stalls_until_its_retransmission() -> None:
    async with proxied({"loss": {"probability": 0.999, "retransmit-s": 0.001}}) as proxy:
        reader, writer = await connect(proxy)
        writer.write(b"ping")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # 15 losses in a row take 33 s
                await reader.read(4)
        writer.close()


async def test_interruption_ends_and_refuses_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, is_advanced = 0.5, asyncio.Event()

    async def sleep_until_advanced(_: FaultProxy) -> None:
        await is_advanced.wait()
        is_advanced.clear()

    monkeypatch.setattr(FaultProxy, "_now", lambda _: now_s)
    monkeypatch.setattr(FaultProxy, "_sleep_until_change", sleep_until_advanced)
    group = {"availability": {"intervals-s": [[0, 1], [2, 100]]}}
    async with proxied(group) as proxy:
        reader, writer = await connect(proxy)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        now_s = 1.5
        is_advanced.set()
        with pytest.raises(ENDED):
            await reader.readexactly(1)
        writer.close()
        with pytest.raises(ENDED):
            await round_trip(proxy, b"during")
        now_s = 2.5
        is_advanced.set()
        assert await round_trip(proxy, b"after") == b"after"
        assert proxy.interruptions == 1


async def test_slow_receiver_stops_the_sender() -> None:
    finished = asyncio.Event()

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio declares the base class of transports
        await finished.wait()
        writer.transport.abort()

    async with proxied({"latency": 0.01}, never_read) as proxy:
        _, writer = await connect(proxy)
        sent: list[int] = []

        async def send() -> None:
            while True:
                writer.write(bytes(65536))
                sent.append(65536)
                await writer.drain()

        with pytest.raises(TimeoutError):
            await wait_within(1.0, send())
        writer.transport.abort()
        finished.set()
        await asyncio.sleep(0)
    assert sum(sent) < MAX_IN_FLIGHT_BYTES + 12 * 1024**2  # and the socket buffers of the system


async def test_delayed_bytes_arrive_before_the_end_of_the_connection() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR 'goodbye'\r\n")
        writer.close()

    async with proxied({"latency": 0.1}, greet) as proxy:
        reader, writer = await connect(proxy)
        assert await reader.read() == b"-ERR 'goodbye'\r\n"
        writer.close()


async def test_unreachable_server_ends_the_connection() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))  # a port without a listener
        async with fault_proxy(device({}), unused.getsockname(), socket.create_server((HOST, 0))) as proxy:
            with pytest.raises(ENDED):
                await round_trip(proxy, b"ping")


async def test_no_task_is_left() -> None:
    before = asyncio.all_tasks()
    async with proxied({"latency": 0.05}) as proxy:
        _, writer = await connect(proxy)
        writer.write(bytes(100_000))
        await asyncio.sleep(0.02)
    writer.close()
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_bus_reconnects_after_interruptions(nats: NatsServer) -> None:
    url = urlsplit(nats.url)
    assert url.hostname is not None
    assert url.port is not None
    # on a busy machine, the bus may connect after the first interruption
    intervals = [[0, 0.7], [0.9, 4], [4.2, 12], [12.2, 30], [30.2, 100]]
    group = {"latency": 0.02, "availability": {"intervals-s": intervals}}
    listener = socket.create_server((HOST, 0))
    async with fault_proxy(device(group), (url.hostname, url.port), listener) as proxy:
        through_proxy = nats.url.replace(f":{url.port}", f":{proxy.port}")
        async with Bus.connect(through_proxy, Identity(FederationId("dev"), "test")) as bus:
            await eventually(lambda: proxy.interruptions > 0)
            await eventually(lambda: proxy.is_connected)
            # a request that was written to the broken connection is lost, as NATS gives no guarantee for it
            await retry(bus.create_streams, on=NatsTimeoutError)
            await eventually(lambda: bus.is_connected)


async def test_tls_passes_through_with_the_name_of_the_server(tmp_path: Path) -> None:
    async with trusted_bus(tmp_path) as bus:
        access = replace(bus.access_for("c1"), proxied_host="localhost")
        listener = socket.create_server((HOST, 0))
        async with fault_proxy(device({"latency": 0.02}), ("localhost", bus.port), listener) as proxy:
            url, identity = f"tls://{HOST}:{proxy.port}", Identity(FED, "client-manager", "c1")
            async with Bus.connect(url, identity, access=access) as connected:
                assert connected.is_connected
            # the certificate has the name localhost, not that of another host
            with pytest.raises(AccessDenied):
                async with Bus.connect(url, identity, access=replace(access, proxied_host="other")):
                    pass
