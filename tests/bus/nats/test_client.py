"""A client keeps receiving after a call that timed out, was cancelled or failed."""

import asyncio
from typing import Any

import pytest
from nats.errors import TimeoutError as NatsTimeoutError
from support import NatsServer, eventually

from fedbus.bus.errors import BusClosed
from fedbus.bus.nats.client import ReliableClient
from fedbus.bus.nats.connection import open_connection
from fedbus.bus.nats.flush import flush_subscriptions


async def assert_receives(client: Any) -> None:
    received = asyncio.Event()

    async def receive(_: object) -> None:
        received.set()

    subscription = await client.subscribe("probe", cb=receive)
    await client.publish("probe", b"")
    await asyncio.wait_for(received.wait(), 10)
    await subscription.unsubscribe()


async def test_a_flush_that_times_out_does_not_end_the_read_loop(nats: NatsServer) -> None:
    async with open_connection(nats.url, name="test", inbox="_INBOX") as connection:
        client, resumed = connection.client, asyncio.Event()
        parse = client._ps.parse

        async def parse_late(data: bytes = b"") -> None:
            await resumed.wait()
            await parse(data)

        client._ps.parse = parse_late  # type: ignore[method-assign]  # holds the PONGs back
        for _ in range(3):
            with pytest.raises(NatsTimeoutError):
                await client.flush(0.001)  # type: ignore[arg-type]  # declared int, and slept
        resumed.set()
        await assert_receives(client)
        await flush_subscriptions(client)


async def test_a_cancelled_flush_does_not_end_the_read_loop(nats: NatsServer) -> None:
    async with open_connection(nats.url, name="test", inbox="_INBOX") as connection:
        for _ in range(20):
            flushing = asyncio.create_task(flush_subscriptions(connection.client))
            await asyncio.sleep(0)
            flushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flushing
        await assert_receives(connection.client)


async def test_an_error_in_the_read_loop_reconnects(
    nats: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_connection(nats.url, name="test", inbox="_INBOX") as connection:
        client = connection.client
        assert isinstance(client, ReliableClient)
        parse, errors = client._ps.parse, [RuntimeError("a fault of the client")]

        async def fail_once(data: bytes = b"") -> None:
            if errors:
                raise errors.pop()
            await parse(data)

        client._ps.parse = fail_once  # type: ignore[method-assign]  # an error in the read loop
        await client.publish("probe", b"")
        await client._send_ping()
        await eventually(lambda: client.stats["reconnects"] == 1)
        await assert_receives(client)
    assert "a fault of the client" in caplog.text


async def test_a_connection_that_breaks_while_it_closes_is_closed(nats: NatsServer) -> None:
    async with open_connection(nats.url, name="test", inbox="_INBOX") as connection:
        client: Any = connection.client
        subscription = await client.subscribe("probe")
        reading = asyncio.ensure_future(anext(connection.messages(subscription), None))
        await asyncio.sleep(0)

        async def fail() -> None:
            raise ConnectionResetError("Connection lost")

        client._transport.drain = fail
        await client._flush_pending()
        client._pending, client._pending_data_size = [b"PUB probe 0\r\n\r\n"], 15
        await client.close()
        assert client.is_closed
        with pytest.raises(BusClosed):
            await reading
