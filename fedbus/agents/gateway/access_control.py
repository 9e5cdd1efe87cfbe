"""Who may talk to the dashboard, and what a page of it may do.

A page on the internet can have its visitor's browser ask any address, ours too, even under a
name of its own that leads to 127.0.0.1. So only names that we are known by are answered, what
changes something needs a token in a header (which no foreign page can send), and our pages may
load nothing but our own files: whatever a message says, it cannot become a script.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
WRONG_TOKEN_DELAY_S: Final = 0.5
"""What a guess costs."""
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class AccessControl:
    """Answers to the names in *hosts* alone; lets in who has the *token*, where there is one."""

    def __init__(self, hosts: Collection[str], token: str = "") -> None:
        self._hosts = LOOPBACK | {host.lower() for host in hosts}
        self._token = token.encode()

    @property
    def acts(self) -> bool:
        """Whether anything can be changed here at all."""
        return bool(self._token)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (host := _host_name(request.host)) not in self._hosts:
            return _error_response(
                421,
                f"this dashboard is not known as {host[:100]!r}: name it with --allow-host, "
                "or open it by the address that it printed",
            )
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = _error_response(error.status, error.text or error.reason)
        if not response.prepared:
            response.headers.update(
                {name: SECURITY_HEADERS[name] for name in SECURITY_HEADERS if name not in response.headers}
            )
        return response

    async def refusal(self, request: web.Request) -> web.Response | None:
        """Why *request* may not change anything; None where it may."""
        if not self._token:
            return _error_response(403, "this dashboard only shows: set FEDBUS_GATEWAY_TOKEN for it to act")
        if not self._same_origin(request):
            return _error_response(403, "asked by another site's page")
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._token)
        if kind.lower() != "bearer" or not right:
            await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            return _error_response(401, "the token is not the one that FEDBUS_GATEWAY_TOKEN holds")
        return None

    def _same_origin(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc.lower() == request.host.lower()


def _host_name(host: str) -> str:
    """The host in a Host header, without its port; nothing where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _error_response(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers=SECURITY_HEADERS)
