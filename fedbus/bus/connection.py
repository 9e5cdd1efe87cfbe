"""One connection to NATS that comes back for ever.

A lost server is waited for, with jitter, so that a thousand devices do not return at the
same moment; only a connection that was closed for good (wrong credentials, say) is an error,
and then the process should end.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from fedbus.bus.errors import BusClosed, BusUnreachable
from fedbus.bus.lean_nats import make_lean

CONNECT_TIMEOUT_S = 5
FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 5.0
PENDING_BYTES = 64 * 1024**2
"""What may wait in this process while the server is away, before a publish is an error."""
DRAIN_TIMEOUT_S = 5

log = structlog.get_logger("fedbus.bus")


class HeedfulClient(Client):
    """A client whose requests, and so its publishes to a stream, never lose a cancellation.

    nats-py waits for answers by ``asyncio.wait_for``, which up to Python 3.11 forgets that it was cancelled
    when the answer comes in the same moment: a task that was asked to end would go on, and whoever waits for
    its end would wait for ever. No longer needed from Python 3.12 on.
    """

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        answer = await super().request(*args, **kwargs)
        if task and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError
        return answer


class Connection:
    """A connected client, and the word when it is gone for good."""

    def __init__(self, client: Client, gone: asyncio.Future[None]) -> None:
        self.client = client
        self._gone = gone

    async def lost(self) -> None:
        """Wait until the connection is closed for good, which raises BusClosed."""
        await asyncio.shield(self._gone)
        raise BusClosed(
            "the connection to NATS was closed: see the log for the reason, and start the process anew"
        )


@asynccontextmanager
async def connection(
    url: str, *, name: str, inbox: str, options: dict[str, Any] | None = None
) -> AsyncIterator[Connection]:
    """A connection for as long as the block runs; what was sent is flushed before it closes.

    Raises BusUnreachable where nobody answers at first.
    """
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    client = await _connect(url, name, inbox, gone, options or {})
    try:
        yield Connection(client, gone)
    finally:
        gone.cancel()
        await _leave(client)


async def _connect(
    url: str, name: str, inbox: str, gone: "asyncio.Future[None]", options: dict[str, Any]
) -> Client:
    attempts = 0
    client: Client | None = None

    obstacle: Exception | None = None

    async def on_error(error: Exception) -> None:
        nonlocal obstacle
        if client is None:
            obstacle = error  # told once, by the exception, where it keeps us from connecting at all
        else:
            log.warning("nats says", error=str(error) or type(error).__name__, name=name)

    async def on_disconnect() -> None:
        if not gone.done():  # a goodbye of our own is no news
            log.warning("the bus is away", name=name)

    async def on_reconnect() -> None:
        nonlocal attempts
        attempts = 0
        log.info("the bus is back", name=name)

    async def on_close() -> None:
        if not gone.done():
            gone.set_result(None)

    def next_server(servers: list[Server], _: dict[str, Any]) -> tuple[Server | None, float]:
        nonlocal attempts
        attempts += 1
        ceiling = min(LONGEST_RECONNECT_S, FIRST_RECONNECT_S * 2**attempts)
        return random.choice(servers), random.uniform(0, ceiling)  # noqa: S311 (jitter, not a secret)

    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connecting = HeedfulClient()
            make_lean(connecting)
            await connecting.connect(
                url,
                name=name,
                inbox_prefix=inbox,
                connect_timeout=CONNECT_TIMEOUT_S,
                allow_reconnect=True,
                max_reconnect_attempts=1,
                reconnect_time_wait=FIRST_RECONNECT_S,  # type: ignore[arg-type]  # declared int, and slept
                reconnect_to_server_handler=next_server,
                pending_size=PENDING_BYTES,
                drain_timeout=DRAIN_TIMEOUT_S,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                closed_cb=on_close,
                **options,
            )
            client = connecting
    except (NatsError, NoServersError, OSError, TimeoutError) as error:
        raise BusUnreachable(url, _why(error, obstacle)) from None
    # Twice at first, so that a wrong address is told at once; for ever from now on.
    client.options["max_reconnect_attempts"] = -1
    return client


def _why(error: Exception, obstacle: Exception | None) -> str:
    if isinstance(error, TimeoutError) and obstacle is None:
        return f"nobody answered within {CONNECT_TIMEOUT_S} s"
    cause = obstacle or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


async def _leave(client: Client) -> None:
    """Flush and close. Shielded: a cancelled drain kills nats-py's read loop and loses what was sent."""
    if client.is_closed:
        return
    leaving = asyncio.ensure_future(client.drain() if client.is_connected else client.close())
    try:
        await asyncio.shield(leaving)
    except asyncio.CancelledError:
        await asyncio.wait([leaving], timeout=DRAIN_TIMEOUT_S)
        raise
    except NatsError as error:
        log.warning("left the bus in a hurry", error=str(error))
        await client.close()
