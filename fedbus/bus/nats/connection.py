"""A connection to NATS that reconnects without limit.

Reconnects have jitter, so that a thousand devices do not reconnect at the same moment. Only failures that waiting
cannot resolve are errors, after which the process should exit: a rejected connection (`AccessDenied`, see
`auth_errors`), and a connection that was closed for good.

A permission violation is logged with its subject, and a request on that subject fails at once. NATS reports the
violation only asynchronously, so the request would otherwise time out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from fedbus.bus.errors import AccessDenied, BusClosed, BusUnreachable
from fedbus.bus.memory.client import ConnectionCallbacks
from fedbus.bus.memory.server import SCHEME, MemoryServer
from fedbus.bus.nats import auth_errors
from fedbus.bus.nats.client import ReliableClient
from fedbus.bus.nats.parser import use_large_payload_parser
from fedbus.common.jitter import JITTER

CONNECT_TIMEOUT_S = 5
MIN_RECONNECT_S = 0.05
MAX_RECONNECT_S = 5.0
MAX_DOUBLINGS = 10
"""Doublings of the shortest pause, enough to reach the longest one. Without a limit, the power overflows."""
PENDING_BYTES = 64 * 1024**2
"""Bytes that nats-py buffers in this process while disconnected; beyond, a publish raises."""
DRAIN_TIMEOUT_S = 5
MAX_AUTH_REJECTIONS = 3
"""Rejections in a row until the connection ends: a server that is starting may not have loaded its accounts yet."""

log = structlog.get_logger("fedbus.bus")


class Connection:
    """A connected client that reports when its connection is closed for good."""

    def __init__(self, client: Client, closed: asyncio.Future[None]) -> None:
        self.client = client
        self._closed = closed

    async def wait_closed(self) -> None:
        """Wait until the connection is closed for good, which raises BusClosed or AccessDenied."""
        await asyncio.shield(self._closed)
        raise BusClosed(
            "the connection to NATS is closed: see the log for the cause, then restart the process"
        )

    async def messages(self, subscription: Subscription) -> AsyncIterator[Msg]:
        """Yield the messages of *subscription*, until it ends.

        nats-py only ends the iteration when the connection is closed for good, before it calls `closed_cb`. An agent
        would take that for the end of its work, and its process would end with exit code 0.

        Raises:
            BusClosed: The connection is closed for good.
            AccessDenied: The server closed it, because it rejects the credentials.

        """
        async for message in subscription.messages:
            yield message
        if self.client.is_closed and not self._closed.cancelled():
            await self.wait_closed()


@asynccontextmanager
async def open_connection(
    url: str, *, name: str, inbox: str, options: dict[str, Any] | None = None
) -> AsyncIterator[Connection]:
    """Open a connection for the duration of the block; it is flushed before it closes.

    Raises:
        BusUnreachable: No server responds at first, or no in-memory server has the name in *url*.
        AccessDenied: The server rejects the connection.

    """
    monitor = _ConnectionMonitor(url, name, options or {})
    if url.startswith(SCHEME):
        client: Client = _connect_in_memory(url, name, inbox, monitor)
    else:
        client = await _connect(url, name, inbox, monitor, options or {})
    try:
        yield Connection(client, monitor.closed)
    finally:
        if not monitor.closed.cancel() and not monitor.closed.cancelled():
            monitor.closed.exception()  # retrieve it, or asyncio logs "exception was never retrieved"
        await _drain(client)


class _ConnectionMonitor:
    """Handles the callbacks of nats-py for one connection."""

    def __init__(self, url: str, name: str, options: dict[str, Any]) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client: ReliableClient | None = None
        """None until it is connected."""
        self.connect_error: Exception | None = None
        """The last error before the connection was established."""
        self._url = url
        self._name = name
        self._creds = Path(options["user_credentials"]) if "user_credentials" in options else None
        self._is_proxied = "tls_hostname" in options
        self._doublings = self._rejections = 0

    def access_denied(self, error: Exception) -> AccessDenied | None:
        return auth_errors.access_denied_from(self._url, error, self._creds)

    async def on_error(self, error: Exception) -> None:
        if self.client is None:
            self.connect_error = error  # reported once, by the exception that ends the attempt
        elif (violation := auth_errors.parse_permission_error(error)) is not None:
            log.error(
                "Permission denied by NATS",
                action=violation.action,
                subject=violation.subject,
                name=self._name,
            )
            self.client.fail_request(violation.subject)
            if violation.action == "subscription":
                self.client.fail_replies(violation.subject)
        elif (denied := self.access_denied(error)) is not None:
            self._rejections += 1
            if self._rejections >= MAX_AUTH_REJECTIONS:
                self._end(denied)
        else:
            await self.log_error(error)

    async def log_error(self, error: Exception) -> None:
        log.warning("NATS client error", error=str(error) or type(error).__name__, name=self._name)

    async def on_disconnect(self) -> None:
        if not self.closed.done():  # our own shutdown needs no warning
            log.warning("Disconnected from NATS; reconnecting", name=self._name)

    async def on_reconnect(self) -> None:
        self._doublings = self._rejections = 0
        log.info("Reconnected to NATS", name=self._name)

    async def on_close(self) -> None:
        last = self.client.last_error if self.client else None
        denied = self.access_denied(last) if last is not None else None
        if denied is not None:
            self._end(denied)
        elif not self.closed.done():
            self.closed.set_result(None)

    def next_server(self, servers: list[Server], _: dict[str, Any]) -> tuple[Server | None, float]:
        self._doublings = min(self._doublings + 1, MAX_DOUBLINGS)
        if self._is_proxied:  # the servers of a cluster announce their own addresses
            own = urlsplit(self._url).netloc
            servers = [server for server in servers if server.uri.netloc == own] or servers
        ceiling = min(MAX_RECONNECT_S, MIN_RECONNECT_S * 2**self._doublings)
        return JITTER.choice(servers), JITTER.uniform(0, ceiling)

    def _end(self, denied: AccessDenied) -> None:
        if not self.closed.done():
            log.error("Connection rejected", reason=denied.reason, advice=denied.advice, name=self._name)
            self.closed.set_exception(denied)


def _connect_in_memory(url: str, name: str, inbox: str, monitor: _ConnectionMonitor) -> Client:
    if (server := MemoryServer.at(url)) is None:
        raise BusUnreachable(url, "no in-memory server of this process has this name")
    callbacks = ConnectionCallbacks(
        monitor.log_error, monitor.on_disconnect, monitor.on_reconnect, monitor.on_close
    )
    return server.connect(name, inbox, callbacks, pending_bytes=PENDING_BYTES)


async def _connect(
    url: str, name: str, inbox: str, monitor: _ConnectionMonitor, options: dict[str, Any]
) -> Client:
    client = ReliableClient()
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
                reconnect_to_server_handler=monitor.next_server,
                pending_size=PENDING_BYTES,
                drain_timeout=DRAIN_TIMEOUT_S,
                error_cb=monitor.on_error,
                disconnected_cb=monitor.on_disconnect,
                reconnected_cb=monitor.on_reconnect,
                closed_cb=monitor.on_close,
                **options,
            )
    except (NatsError, NoServersError, OSError, TimeoutError, ValueError) as error:
        if (denied := monitor.access_denied(monitor.connect_error or error)) is not None:
            raise denied from None
        if isinstance(error, ValueError):
            raise
        raise BusUnreachable(url, _describe_failure(error, monitor.connect_error)) from None
    monitor.client = client
    # The first connect tries twice, so that a wrong address fails at once; reconnects have no limit.
    client.options["max_reconnect_attempts"] = -1
    return client


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Filter the warning that asyncio 3.11 logs at each end of a connection upgraded to TLS, as NATS's are."""
    return "eof_received() has no effect when using ssl" not in record.getMessage()


def _describe_failure(error: Exception, connect_error: Exception | None) -> str:
    if isinstance(error, TimeoutError) and connect_error is None:
        return f"no reply within {CONNECT_TIMEOUT_S} s"
    cause = connect_error or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


async def _drain(client: Client) -> None:
    """Flush and close. Shielded: a cancelled drain loses what was sent."""
    if client.is_closed:
        return
    closing = asyncio.ensure_future(client.drain() if client.is_connected else client.close())
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing], timeout=DRAIN_TIMEOUT_S)
        raise
    except (NatsError, OSError) as error:
        log.warning("Drain failed; closed without flushing", error=str(error))
        await client.close()
