"""From here on the broker knows of our subscriptions."""

import asyncio

from nats.aio.client import Client


async def flush_subscriptions(connection: Client) -> None:
    """Wait until all that was sent so far, a subscription for one, has reached the broker.

    nats-py 2.16 writes the PING of a flush ahead of what waits to be sent: only a second one comes
    behind it. Shielded, because a cancelled flush kills nats-py's read loop.
    """
    for _ in range(2):
        await asyncio.shield(connection.flush())
