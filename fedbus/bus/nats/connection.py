"""One connection to NATS that comes back for ever.

A lost server is waited for, with jitter, so that a thousand devices do not return at the
same moment. Only what waiting does not mend is an error, and then the process should end: a bus
that rejects the connection (`AccessDenied`, see `auth_errors`), and a connection closed for good.

What the bus does not permit is said in the log by its subject, and a request on it fails at
once: the broker says so only on the side, and the request itself would time out.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from fedbus.bus.errors import AccessDenied, BusClosed, BusUnreachable, PermissionDenied
from fedbus.bus.nats import auth_errors
from fedbus.bus.nats.cancellation import propagate_cancellation
from fedbus.bus.nats.parser import use_large_payload_parser

CONNECT_TIMEOUT_S = 5
MIN_RECONNECT_S = 0.05
MAX_RECONNECT_S = 5.0
PENDING_BYTES = 64 * 1024**2
"""What may wait in this process while the server is away, before a publish is an error."""
DRAIN_TIMEOUT_S = 5
MAX_TRACKED_REQUESTS = 1000
MAX_AUTH_REJECTIONS = 3
"""A server that starts again may not know its accounts yet: only so many refusals in a row are meant."""

log = structlog.get_logger("fedbus.bus")


class CancellationSafeClient(Client):
    """A client that never loses a cancellation: neither while it waits for an answer nor for the socket."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[str, str] = {}
        """Where the answer to the last request on a subject is to go. In lower case: so the broker names subjects."""
        self._not_heard: str | None = None
        """Where our answers come, once the broker has said that we may not listen there."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        if self._not_heard is not None:
            raise _reply_denied(self._not_heard)
        with propagate_cancellation():
            return await super().request(*args, **kwargs)

    async def _flush_pending(self, force_flush: bool = False) -> Any:  # noqa: FBT001, FBT002  # nats-py's
        with propagate_cancellation():
            return await super()._flush_pending(force_flush)

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if reply:
            self._waiting[subject.lower()] = reply
            if len(self._waiting) > MAX_TRACKED_REQUESTS:
                del self._waiting[next(iter(self._waiting))]
        await super().publish(subject, payload, reply, headers)

    def _connect_command(self) -> bytes:
        """Who we are, held back to be sent in one piece with the PING behind it.

        nats-py 2.16 sends them one by one; a server that turns us away after the first says why and closes, the
        second fails, and what was said is never read.
        """
        command: bytes = super()._connect_command()
        transport: Any = self._transport
        write = transport.write

        def write_both(payload: bytes) -> None:
            if payload:
                transport.write = write
                write(command + payload)

        transport.write = write_both
        return b""

    def forbid(self, subject: str) -> None:
        """The broker will not have what we said on *subject*: whoever waits for the answer hears it now."""
        if (reply := self._waiting.pop(subject, None)) is None:
            return
        answer = self._resp_map.get(reply.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_exception(PermissionDenied(f"publish on {subject}"))

    def forbid_answers(self, subject: str) -> None:
        """The broker will not let us hear on *subject*; where answers come there, nobody needs to wait for one."""
        answers_at = bytes(self._resp_sub_prefix or b"").decode().lower()
        if not answers_at or subject != f"{answers_at}*":
            return
        self._not_heard = subject
        for answer in self._resp_map.values():
            if not answer.done():
                answer.set_exception(_reply_denied(subject))


def _reply_denied(subject: str) -> PermissionDenied:
    whose = subject.rsplit(".", 2)[0]  # without what is new with each connection
    return PermissionDenied(f"hear answers on {whose} with these credentials")


class Connection:
    """A connected client, and the word when it is gone for good."""

    def __init__(self, client: Client, gone: asyncio.Future[None]) -> None:
        self.client = client
        self._closed = gone

    async def lost(self) -> None:
        """Wait until the connection is closed for good, which raises BusClosed or AccessDenied."""
        await asyncio.shield(self._closed)
        raise BusClosed(
            "the connection to NATS is closed: see the log for the cause, then restart the process"
        )

    async def messages(self, subscription: Subscription) -> AsyncIterator[Msg]:
        """The messages of *subscription*, until it ends.

        nats-py only ends the iteration when the connection is closed for good, before it calls `closed_cb`. An agent
        would take that for the end of its work, and its process would end with exit code 0.

        Raises:
            BusClosed: the connection is closed for good.
            AccessDenied: the server has closed it, because it rejects the credentials.

        """
        async for message in subscription.messages:
            yield message
        if self.client.is_closed and not self._closed.cancelled():
            await self.lost()


@asynccontextmanager
async def open_connection(
    url: str, *, name: str, inbox: str, options: dict[str, Any] | None = None
) -> AsyncIterator[Connection]:
    """A connection for as long as the block runs; what was sent is flushed before it closes.

    Raises BusUnreachable if no server responds at first, AccessDenied if it rejects the connection.
    """
    watch = _ConnectionMonitor(url, name, options or {})
    client = await _connect(url, name, inbox, watch, options or {})
    try:
        yield Connection(client, watch.gone)
    finally:
        if not watch.gone.cancel() and not watch.gone.cancelled():
            watch.gone.exception()  # whoever waited has heard it
        await _drain(client)


class _ConnectionMonitor:
    """What nats-py says of a connection, and what we make of it."""

    def __init__(self, url: str, name: str, options: dict[str, Any]) -> None:
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client: CancellationSafeClient | None = None
        """From the moment on that it is connected."""
        self.obstacle: Exception | None = None
        """What kept us from connecting at all."""
        self._url = url
        self._name = name
        self._creds = Path(options["user_credentials"]) if "user_credentials" in options else None
        self._attempts = self._refusals = 0

    def denial(self, error: Exception) -> AccessDenied | None:
        return auth_errors.access_denied_from(self._url, error, self._creds)

    async def on_error(self, error: Exception) -> None:
        if self.client is None:
            self.obstacle = error  # told once, by the exception that ends the attempt
        elif (forbidden := auth_errors.parse_permission_error(error)) is not None:
            log.error(
                "Permission denied by NATS",
                action=forbidden.action,
                subject=forbidden.subject,
                name=self._name,
            )
            self.client.forbid(forbidden.subject)
            if forbidden.action == "subscription":
                self.client.forbid_answers(forbidden.subject)
        elif (denied := self.denial(error)) is not None:
            self._refusals += 1
            if self._refusals >= MAX_AUTH_REJECTIONS:
                self._end(denied)
        else:
            log.warning("NATS client error", error=str(error) or type(error).__name__, name=self._name)

    async def on_disconnect(self) -> None:
        if not self.gone.done():  # a goodbye of our own is no news
            log.warning("Disconnected from NATS; reconnecting", name=self._name)

    async def on_reconnect(self) -> None:
        self._attempts = self._refusals = 0
        log.info("Reconnected to NATS", name=self._name)

    async def on_close(self) -> None:
        last = self.client.last_error if self.client else None
        denied = self.denial(last) if last is not None else None
        if denied is not None:
            self._end(denied)
        elif not self.gone.done():
            self.gone.set_result(None)

    def next_server(self, servers: list[Server], _: dict[str, Any]) -> tuple[Server | None, float]:
        self._attempts += 1
        ceiling = min(MAX_RECONNECT_S, MIN_RECONNECT_S * 2**self._attempts)
        return random.choice(servers), random.uniform(0, ceiling)  # noqa: S311 (jitter, not a secret)

    def _end(self, denied: AccessDenied) -> None:
        if not self.gone.done():
            log.error("Connection rejected", reason=denied.reason, advice=denied.advice, name=self._name)
            self.gone.set_exception(denied)


async def _connect(
    url: str, name: str, inbox: str, watch: _ConnectionMonitor, options: dict[str, Any]
) -> Client:
    client = CancellationSafeClient()
    use_large_payload_parser(client)
    if "tls" in options:
        logging.getLogger("asyncio").addFilter(_is_worth_logging)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.connect(
                url,
                name=name,
                inbox_prefix=inbox,
                connect_timeout=CONNECT_TIMEOUT_S,
                allow_reconnect=True,
                max_reconnect_attempts=1,
                reconnect_time_wait=MIN_RECONNECT_S,  # type: ignore[arg-type]  # declared int, and slept
                reconnect_to_server_handler=watch.next_server,
                pending_size=PENDING_BYTES,
                drain_timeout=DRAIN_TIMEOUT_S,
                error_cb=watch.on_error,
                disconnected_cb=watch.on_disconnect,
                reconnected_cb=watch.on_reconnect,
                closed_cb=watch.on_close,
                **options,
            )
    except (NatsError, NoServersError, OSError, TimeoutError, ValueError) as error:
        if (denied := watch.denial(watch.obstacle or error)) is not None:
            raise denied from None
        if isinstance(error, ValueError):
            raise
        raise BusUnreachable(url, _describe_failure(error, watch.obstacle)) from None
    watch.client = client
    # Twice at first, so that a wrong address is told at once; for ever from now on.
    client.options["max_reconnect_attempts"] = -1
    return client


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Asyncio 3.11 warns of each end of a connection that became TLS after it was opened, as NATS's do."""
    return "eof_received() has no effect when using ssl" not in record.getMessage()


def _describe_failure(error: Exception, obstacle: Exception | None) -> str:
    if isinstance(error, TimeoutError) and obstacle is None:
        return f"nobody answered within {CONNECT_TIMEOUT_S} s"
    cause = obstacle or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


async def _drain(client: Client) -> None:
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
        log.warning("Drain failed; closed without flushing", error=str(error))
        await client.close()
