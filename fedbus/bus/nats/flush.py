"""Flush a connection, so that its subscriptions are active on the NATS server."""

import asyncio

from nats.aio.client import Client


async def flush_subscriptions(connection: Client) -> None:
    """Wait until the NATS server has received everything sent so far, including subscriptions.

    nats-py 2.16 writes the PING of a flush before the pending data, so that only a second flush follows the data.
    Shielded, because a cancelled flush stops nats-py's read loop.
    """
    for _ in range(2):
        await asyncio.shield(connection.flush())
