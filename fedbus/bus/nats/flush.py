"""Flush a connection, so that its subscriptions are active on the NATS server."""

from nats.aio.client import Client


async def flush_subscriptions(connection: Client) -> None:
    """Wait until the NATS server has received everything sent so far, including subscriptions.

    nats-py 2.16 writes the PING of a flush before the pending data, so that only a second flush follows the data.
    """
    for _ in range(2):
        await connection.flush()
