"""The gateway agent: serves the dashboard and its live feed to browsers.

It reads the events and lifecycle streams into a bounded buffer (`feed`) and serves them over HTTP
(`http_api`). It owns no lifecycle and no agent depends on it, so starting, stopping or killing it
affects no run. It is read-only unless a token is set; a user with the token can start and stop runs
and choose the champion.
"""

import asyncio
import socket
import ssl
from typing import Final

import structlog
from aiohttp import web

from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.gateway.access_control import AccessControl
from fedbus.agents.gateway.feed import Feed
from fedbus.agents.gateway.http_api import DescribeModels, HttpApi
from fedbus.bus.bus import Bus

STOP_S: Final = 2.0

log = structlog.get_logger("fedbus.gateway")


class GatewayBindError(Exception):
    """The gateway cannot bind its address: the port is in use, or the address is not a local one."""


@log_method_calls
class Gateway:
    """The dashboard of one federation; see `HttpApi` for *models* and *trace_url*."""

    def __init__(
        self,
        bus: Bus,
        guard: AccessControl,
        *,
        models: DescribeModels,
        trace_url: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        """*listening* is a socket that the caller has bound; it replaces *host* and *port*."""
        self._bus = bus
        self._guard = guard
        self._models = models
        self._trace_url = trace_url
        self._host = host
        self._port = port
        self._tls = tls
        self._bound_socket = listening
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The URL of the dashboard; set when the gateway listens."""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop* is set.

        Raises:
            GatewayBindError: the address cannot be bound.

        """
        feed = Feed(self._bus)
        api = HttpApi(self._bus, feed, self._guard, stop, models=self._models, trace_url=self._trace_url)
        runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=STOP_S)
        await runner.setup()
        try:
            self._announce_url(await self._listen(runner))
            log.info("Dashboard started", url=self.url.result(), acts=self._guard.can_act)
            async with asyncio.TaskGroup() as group:
                feed_task = group.create_task(feed.run(), name="read streams")
                await stop.wait()
                feed_task.cancel()
        finally:
            await runner.cleanup()

    def _announce_url(self, url: str) -> None:
        if not self.url.done():
            self.url.set_result(url)

    def _make_site(self, runner: web.AppRunner) -> web.BaseSite:
        if self._bound_socket is not None:
            return web.SockSite(runner, self._bound_socket, ssl_context=self._tls)
        return web.TCPSite(runner, self._host, self._port, ssl_context=self._tls)

    async def _listen(self, runner: web.AppRunner) -> str:
        try:
            await self._make_site(runner).start()
        except OSError as error:
            raise GatewayBindError(
                f"cannot serve the dashboard on {self._host}:{self._port}: {error.strerror}. "
                "Choose another port, or 0 for any free port"
            ) from error
        port = runner.addresses[0][1]
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"
