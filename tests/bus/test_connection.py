"""How the connection is set up, where nats-py has no option for it."""

from typing import Any

from support import NatsServer

from fedbus.bus.connection import READ_BYTES, connection


async def test_a_large_message_is_read_in_large_pieces(nats: NatsServer) -> None:
    async with connection(nats.url, name="reader", inbox="_INBOX") as connected:
        transport: Any = connected.client._transport
        assert transport._io_reader._limit == READ_BYTES
