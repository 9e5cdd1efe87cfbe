"""A NATS micro service for the duration of a block."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.micro
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.micro.service import Service


@asynccontextmanager
async def micro_service(
    client: Client, *, name: str, version: str, description: str, metadata: dict[str, str]
) -> AsyncIterator[Service]:
    """Run the service *name*, without endpoints yet.

    Stopping it on a closed connection raises in nats-py. That error is suppressed: it would hide the reason why the
    connection was closed.
    """
    service = await nats.micro.add_service(
        client, name=name, version=version, description=description, metadata=metadata
    )
    try:
        yield service
    finally:
        with contextlib.suppress(NatsError):
            await service.stop()
