"""Requests without the fedbus envelope, for example predictions by `nats req`: bytes in, bytes out.

The service is a NATS micro service (`nats micro ls`). A rejection is a service error with an HTTP status code, a
reason, and the body that the same request would get over HTTP.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeAlias

import structlog
from nats.aio.client import Client
from nats.micro.request import Request

from fedbus.bus.nats.flush import flush_subscriptions
from fedbus.bus.nats.micro_service import micro_service

RawHandler: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Answers one request; raises RequestRejected."""

log = structlog.get_logger("fedbus.bus")


class RequestRejected(Exception):
    """The rejection of a raw request: an HTTP status code, a one-line reason, and a machine-readable body."""

    def __init__(self, code: int, reason: str, body: bytes) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.body = body


@asynccontextmanager
async def serve_raw(
    client: Client,
    name: str,
    endpoints: Mapping[str, tuple[str, RawHandler]],
    *,
    version: str,
    description: str,
    metadata: dict[str, str],
) -> AsyncIterator[None]:
    """Run the micro service *name* for the duration of the block. *endpoints*: subject and handler by name."""
    async with micro_service(
        client, name=name, version=version, description=description, metadata=metadata
    ) as service:
        for endpoint, (subject, handler) in endpoints.items():
            await service.add_endpoint(name=endpoint, subject=subject, handler=_make_endpoint(handler))
        await flush_subscriptions(client)
        yield


def _make_endpoint(handler: RawHandler) -> Callable[[Request], Awaitable[None]]:
    async def answer(request: Request) -> None:
        try:
            body = await handler(request.data)
        except RequestRejected as rejected:
            await request.respond_error(str(rejected.code), rejected.reason, data=rejected.body)
        else:
            await request.respond(body)

    return answer
