"""A NATS micro service for as long as a block runs, and not a moment of trouble more."""

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
    """The service *name*, without an endpoint yet.

    A connection that is gone has taken it along. To say goodbye on it then is an error in nats-py, which would
    stand in the place of the reason why the connection is gone.
    """
    service = await nats.micro.add_service(
        client, name=name, version=version, description=description, metadata=metadata
    )
    try:
        yield service
    finally:
        with contextlib.suppress(NatsError):
            await service.stop()
