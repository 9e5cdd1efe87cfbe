"""Questions from people and programs that know nothing of our envelope: bytes in, bytes out, by `nats req`.

A micro service like the others (`nats micro ls`), for what is asked often and by anybody: predictions. A
refusal is the service's error, with its code and its reason, and its body is what it would be by HTTP.
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
"""Answers one question; raises TurnedAway."""

log = structlog.get_logger("fedbus.bus")


class RequestRejected(Exception):
    """The answer is no: a *code* as HTTP has it, one line that says why, and a *body* that says it to programs."""

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
    """The service *name* for as long as the block runs; of each endpoint the subject, and who answers."""
    async with micro_service(
        client, name=name, version=version, description=description, metadata=metadata
    ) as service:
        for endpoint, (subject, answer) in endpoints.items():
            await service.add_endpoint(name=endpoint, subject=subject, handler=_make_endpoint(answer))
        await flush_subscriptions(client)
        yield


def _make_endpoint(answer: RawHandler) -> Callable[[Request], Awaitable[None]]:
    async def handle(request: Request) -> None:
        try:
            body = await answer(request.data)
        except RequestRejected as no:
            await request.respond_error(str(no.code), no.reason, data=no.body)
        else:
            await request.respond(body)

    return handle
