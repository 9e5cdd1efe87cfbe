"""One connection to NATS that comes back for ever.

A lost server is waited for, with jitter, so that a thousand devices do not return at the
same moment. Only what waiting does not mend is an error, and then the process should end: a bus
that will not have us (`AccessDenied`, see `denials`), and a connection that was closed for good.

What the bus does not permit is said in the log by its subject, and a request on it fails at
once: the broker says so only on the side, and the request itself would time out.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from fedbus.bus import denials
from fedbus.bus.errors import BusClosed, BusUnreachable, Forbidden
from fedbus.bus.lean_nats import make_lean

CONNECT_TIMEOUT_S = 5
FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 5.0
PENDING_BYTES = 64 * 1024**2
"""What may wait in this process while the server is away, before a publish is an error."""
DRAIN_TIMEOUT_S = 5
WAITING_REMEMBERED = 1000
REFUSALS_BELIEVED = 3
"""A server that starts again may not know its accounts yet: only so many refusals in a row are meant."""

log = structlog.get_logger("fedbus.bus")


class HeedfulClient(Client):
    """A client whose requests, and so its publishes to a stream, never lose a cancellation.

    nats-py waits for answers by ``asyncio.wait_for``, which up to Python 3.11 forgets that it was cancelled
    when the answer comes in the same moment: a task that was asked to end would go on, and whoever waits for
    its end would wait for ever. No longer needed from Python 3.12 on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[str, str] = {}
        """Where the answer to the last request on a subject is to go. In lower case: so the broker names subjects."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        answer = await super().request(*args, **kwargs)
        if task and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError
        return answer

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", **more: Any) -> None:
        if reply:
            self._waiting[subject.lower()] = reply
            if len(self._waiting) > WAITING_REMEMBERED:
                del self._waiting[next(iter(self._waiting))]
        await super().publish(subject, payload, reply, **more)

    def forbid(self, subject: str) -> None:
        """The broker will not have what we said on *subject*: whoever waits for the answer hears it now."""
        if (reply := self._waiting.pop(subject, None)) is None:
            return
        answer = self._resp_map.get(reply.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_exception(Forbidden(f"publish on {subject}"))


class Connection:
    """A connected client, and the word when it is gone for good."""

    def __init__(self, client: Client, gone: asyncio.Future[None]) -> None:
        self.client = client
        self._gone = gone

    async def lost(self) -> None:
        """Wait until the connection is closed for good, which raises BusClosed or AccessDenied."""
        await asyncio.shield(self._gone)
        raise BusClosed(
            "the connection to NATS was closed: see the log for the reason, and start the process anew"
        )


@asynccontextmanager
async def connection(
    url: str, *, name: str, inbox: str, options: dict[str, Any] | None = None
) -> AsyncIterator[Connection]:
    """A connection for as long as the block runs; what was sent is flushed before it closes.

    Raises BusUnreachable where nobody answers at first, and AccessDenied where we are turned away.
    """
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    client = await _connect(url, name, inbox, gone, options or {})
    try:
        yield Connection(client, gone)
    finally:
        if not gone.cancel():
            gone.exception()  # whoever waited has heard it
        await _leave(client)


async def _connect(
    url: str, name: str, inbox: str, gone: "asyncio.Future[None]", options: dict[str, Any]
) -> Client:
    attempts = refusals = 0
    client: HeedfulClient | None = None
    creds = Path(options["user_credentials"]) if "user_credentials" in options else None

    obstacle: Exception | None = None

    async def on_error(error: Exception) -> None:
        nonlocal obstacle, refusals
        if client is None:
            obstacle = error  # told once, by the exception, where it keeps us from connecting at all
        elif (forbidden := denials.forbidden_by(error)) is not None:
            log.error("not permitted", action=forbidden.action, subject=forbidden.subject, name=name)
            client.forbid(forbidden.subject)
        elif (denied := denials.denied_by(url, error, creds)) is not None:
            refusals += 1
            if refusals >= REFUSALS_BELIEVED and not gone.done():
                log.error("turned away", reason=denied.reason, advice=denied.advice, name=name)
                gone.set_exception(denied)
        else:
            log.warning("nats says", error=str(error) or type(error).__name__, name=name)

    async def on_disconnect() -> None:
        if not gone.done():  # a goodbye of our own is no news
            log.warning("the bus is away", name=name)

    async def on_reconnect() -> None:
        nonlocal attempts, refusals
        attempts = refusals = 0
        log.info("the bus is back", name=name)

    async def on_close() -> None:
        if gone.done():
            return
        last = client.last_error if client else None
        if last is not None and (denied := denials.denied_by(url, last, creds)) is not None:
            log.error("turned away", reason=denied.reason, advice=denied.advice, name=name)
            gone.set_exception(denied)
        else:
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
    except (NatsError, NoServersError, OSError, TimeoutError, ValueError) as error:
        if (denied := denials.denied_by(url, obstacle or error, creds)) is not None:
            raise denied from None
        if isinstance(error, ValueError):
            raise
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
