"""Access control of the dashboard: Host allow-list, bearer token and security headers.

A page on another site can make its visitor's browser send requests to any address, including this
gateway, and DNS rebinding lets it use a host name of its own that resolves to 127.0.0.1. Therefore
the gateway answers only to allowed host names, an action needs a token in a header, which a page of
another site cannot send, and the Content-Security-Policy lets the dashboard load only its own files,
so that no content of a message can run as a script.
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
"""Delay of the reply to a wrong token, to slow down guessing."""
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
    """Checks of the Host header (*hosts*) and of the bearer *token*.

    Without a token the dashboard is read-only.
    """

    def __init__(self, hosts: Collection[str], token: str = "") -> None:
        self._hosts = LOOPBACK | {host.lower() for host in hosts}
        self._token = token.encode()

    @property
    def can_act(self) -> bool:
        """True if actions are enabled, that is, if a token is set."""
        return bool(self._token)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (host := _host_name(request.host)) not in self._hosts:
            return _error_response(
                421,
                f"host name {host[:100]!r} is not allowed. Add it with --allow-host, "
                "or open the address that the dashboard printed at its start",
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

    async def rejection(self, request: web.Request) -> web.Response | None:
        """Return the error response if *request* may not perform an action, otherwise None."""
        if not self._token:
            return _error_response(
                403, "this dashboard is read-only. Set FEDBUS_GATEWAY_TOKEN to enable actions"
            )
        if not self._same_origin(request):
            return _error_response(403, "cross-origin request denied")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        is_valid = hmac.compare_digest(token.strip().encode(), self._token)
        if scheme.lower() != "bearer" or not is_valid:
            await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            return _error_response(
                401, "invalid token. Use the value of FEDBUS_GATEWAY_TOKEN of this gateway"
            )
        return None

    def _same_origin(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc.lower() == request.host.lower()


def _host_name(host: str) -> str:
    """Return the host of a Host header without its port, or an empty string if the header is invalid."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _error_response(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers=SECURITY_HEADERS)
