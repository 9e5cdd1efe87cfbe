"""The proxy of one device.

    async with fault_proxy(device, ("nats.example", 4222), listener) as proxy:
        ...  # connect to proxy.port on 127.0.0.1 instead of nats-server

While the device is not connected under its profile, its connections are aborted and new ones refused; the agents
reconnect as after a real interruption.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.simulation.fault_proxy.link import CHUNK_BYTES, DelayLine, Link
from fedbus.simulation.profiles.conditions import DeviceConditions

MAX_CONNECTIONS: Final = 256
"""Connections of one device; each of its agents and training processes has one."""
CONNECT_TIMEOUT_S: Final = 5.0
MAX_SLEEP_S: Final = 3600.0

log = structlog.get_logger("fedbus.fault_proxy")


class FaultProxy:
    """The proxy of *device* to the address *server*. *started_at* is time 0 of its profile, in seconds of the epoch."""

    def __init__(
        self, device: DeviceConditions, server: tuple[str, int], *, started_at: float | None = None
    ) -> None:
        self._device = device
        self._server = server
        self._clock_offset_s = (
            time.time() - started_at if started_at is not None else 0.0
        ) - time.monotonic()
        self._uplink = Link(device, "upload")
        self._downlink = Link(device, "download")
        self._connections: set[asyncio.Task[None]] = set()
        self.interruptions = 0
        """How often the profile has interrupted the connection."""
        self.port = 0

    @property
    def is_connected(self) -> bool:
        """Whether the device is connected now, under its profile."""
        return self._device.connection.is_on(self._now())

    async def apply_interruptions(self) -> None:
        """Abort the connections whenever the profile interrupts them."""
        while True:
            await self._sleep_until_change()
            if not self.is_connected and self._connections:
                self.interruptions += 1
                back_s = self._device.connection.next_change(self._now()) - self._now()
                log.info(
                    "Connection interrupted by the profile",
                    client=self._device.client,
                    seconds=round(back_s, 1),
                )
                for connection in self._connections:
                    connection.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until it ends."""
        connection = asyncio.current_task()
        assert connection is not None
        if not self.is_connected or len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(connection)
        try:
            await self._forward(reader, writer)
        except asyncio.CancelledError:
            pass  # an interruption, or the end of the proxy; nothing awaits this task
        except (OSError, TimeoutError) as error:
            log.debug("Proxied connection ended", client=self._device.client, reason=str(error))
        finally:
            self._connections.discard(connection)
            writer.transport.abort()

    async def close(self) -> None:
        """Abort all connections."""
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            server_reader, server_writer = await asyncio.open_connection(*self._server, limit=CHUNK_BYTES)
        try:
            await wait_for_first(
                _pump(reader, server_writer, DelayLine(self._uplink)),
                _pump(server_reader, writer, DelayLine(self._downlink)),
            )
        finally:
            server_writer.transport.abort()

    async def _sleep_until_change(self) -> None:
        wait_s = self._device.connection.next_change(self._now()) - self._now()
        await asyncio.sleep(min(max(wait_s, 0.0), MAX_SLEEP_S))

    def _now(self) -> float:
        """Return the time since the start of the profile, which changes of the system clock do not affect."""
        return time.monotonic() + self._clock_offset_s


@asynccontextmanager
async def fault_proxy(
    device: DeviceConditions,
    server: tuple[str, int],
    listener: socket.socket,
    *,
    started_at: float | None = None,
) -> AsyncIterator[FaultProxy]:
    """Run a proxy on *listener* until the block ends."""
    proxy = FaultProxy(device, server, started_at=started_at)
    proxy.port = listener.getsockname()[1]
    acceptor = await asyncio.start_server(proxy.serve, sock=listener, limit=CHUNK_BYTES)
    interruptions = asyncio.create_task(proxy.apply_interruptions(), name=f"interruptions of {device.client}")
    try:
        yield proxy
    finally:
        acceptor.close()
        interruptions.cancel()
        with suppress(asyncio.CancelledError):
            await interruptions
        await proxy.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: DelayLine) -> None:
    """Forward bytes in one direction until the sender closes the connection."""
    writer.transport.set_write_buffer_limits(high=CHUNK_BYTES)

    async def send() -> None:
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            await line.send(chunk)
            if not chunk:
                await asyncio.Future()  # the receiver ends the pump when all bytes are delivered

    async def deliver() -> None:
        while chunk := await line.receive():
            writer.write(chunk)
            await writer.drain()

    await wait_for_first(send(), deliver())
