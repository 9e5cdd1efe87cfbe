"""The gateway: the dashboard and its live feed, for people with a browser.

It reads what everybody may read, keeps a bounded memory of it (`gateway_feed`), and tells it to
browsers over HTTP (`gateway_pages`). It owns no lifecycle and nobody waits for it: started,
stopped or killed, no run notices. It only shows, unless it is given a token; then whoever has
that may start and stop runs and choose which model version is served.
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
    """The port is taken, or the address is not this machine's."""


@log_method_calls
class Gateway:
    """The dashboard of one federation. See `Pages` for *models* and *trace_url*, `Guard` for the rest."""

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
        """*listening*: a socket that somebody has bound for us, in the place of *host* and *port*."""
        self._bus = bus
        self._guard = guard
        self._models = models
        self._trace_url = trace_url
        self._host = host
        self._port = port
        self._tls = tls
        self._bound_socket = listening
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Where it listens, once it does."""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop*; raises CannotListen."""
        feed = Feed(self._bus)
        pages = HttpApi(self._bus, feed, self._guard, stop, models=self._models, trace_url=self._trace_url)
        runner = web.AppRunner(pages.application(), access_log=None, shutdown_timeout=STOP_S)
        await runner.setup()
        try:
            self._announce_url(await self._listen(runner))
            log.info("dashboard", url=self.url.result(), acts=self._guard.acts)
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(feed.run(), name="read the streams")
                await stop.wait()
                reading.cancel()
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
                f"cannot serve the dashboard on {self._host}:{self._port}: {error.strerror}; "
                "choose another port, or 0 for any"
            ) from error
        port = runner.addresses[0][1]
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"
