"""The composition of the dashboard: the gateway, its bus, and the model repository."""

import asyncio
import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from fedbus import __version__
from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.gateway.access_control import LOOPBACK, AccessControl
from fedbus.agents.gateway.agent import Gateway
from fedbus.app.settings import InvalidSetting, Settings
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import BadId
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import open_model_store

TOKEN: Final = "FEDBUS_GATEWAY_TOKEN"  # noqa: S105 (the name of a variable)
TOKEN_FILE: Final = f"{TOKEN}_FILE"
MIN_TOKEN_LENGTH: Final = 16
TRACE_ID_PLACEHOLDER: Final = "{trace_id}"
TEMPO_UID: Final = "tempo"
"""The uid of Grafana's data source, as in deploy/observability/provisioning."""
STORE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True)
class Dashboard:
    """The configuration of the dashboard."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 0
    allowed_hosts: Sequence[str] = ()
    """Further host names that requests may use."""
    trace_url: str = ""
    """URL of a trace, such as ``http://jaeger/trace/{trace_id}``, or URL of Grafana."""
    token: str = ""
    certificate: Path | None = None
    key: Path | None = None
    """With certificate and key, the dashboard uses HTTPS."""
    insecure: bool = False
    """Allow other machines to connect without HTTPS or token, because something else restricts access."""
    bound_socket: socket.socket | None = None
    """The socket that the supervisor has bound, so that no other process can take the announced port."""

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until *stop*.

        Raises:
            GatewayBindError: The port is taken.
            InvalidSetting: The settings would allow access without authentication, or are invalid.
            BusClosed: The connection to NATS is closed for good.

        """
        self.check_access()
        settings = self.settings
        identity = Identity(settings.fed, AgentName.GATEWAY)
        async with (
            Bus.connect(settings.nats_url, identity, access=settings.access) as bus,
            bus.advertise_service(task="every", version=__version__),
        ):
            access = AccessControl([self.host, *self.allowed_hosts], self.token)
            gateway = Gateway(
                bus,
                access,
                models=self.list_models,
                trace_url=trace_url_template(self.trace_url),
                host=self.host,
                port=self.port,
                tls=self.tls_context,
                listening=self.bound_socket,
            )
            await wait_for_first(gateway.run(stop), bus.wait_closed(), self._print_url(gateway))

    def check_access(self) -> None:
        """Check that other machines cannot connect without authentication.

        Raises:
            InvalidSetting: They can.

        """
        safe = self.token and self.certificate is not None
        if self.host in LOOPBACK or safe or self.insecure:
            return
        raise InvalidSetting(
            f"FEDBUS_GATEWAY_HOST: other machines can connect to {self.host}. Set FEDBUS_GATEWAY_TOKEN, --certificate "
            "and --key, or listen on 127.0.0.1. Use --insecure if something else restricts access"
        )

    @property
    def tls_context(self) -> ssl.SSLContext | None:
        """The TLS context; None for HTTP.

        Raises:
            InvalidSetting: Certificate or key is missing or invalid.

        """
        if self.certificate is None and self.key is None:
            return None
        if self.certificate is None or self.key is None:
            raise InvalidSetting("FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: set both or none")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError:
            raise InvalidSetting(
                f"FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: {self.certificate} and {self.key} are not a certificate "
                "and its key in PEM format"
            ) from None
        except OSError as error:
            raise InvalidSetting(f"FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: {error.strerror}") from None
        return context

    async def _print_url(self, gateway: Gateway) -> None:
        print(f"the dashboard is on {await asyncio.shield(gateway.url)}", flush=True)
        await asyncio.Event().wait()

    async def list_models(self, task: str) -> dict[str, Any]:
        """List the versions of *task* in the model repository, or the error why they cannot be read."""
        try:
            store = open_model_store(self.settings.store_url, task, patience_s=STORE_TIMEOUT_S)
            versions, champion = await asyncio.gather(store.list_versions(), store.read_champion())
        except (StoreError, BadId) as error:
            return {"store": "", "versions": [], "champion": None, "error": str(error)}
        return {
            "store": store.url.partition("?")[0],
            "versions": [one.model_dump(mode="json") for one in versions],
            "champion": champion.model_dump(mode="json") if champion else None,
            "error": "",
        }


def trace_url_template(url: str) -> str:
    """Return *url* if it has ``{trace_id}``, else the URL of a trace in the Grafana at *url*."""
    if not url or TRACE_ID_PLACEHOLDER in url:
        return url
    query = {
        "refId": "A",
        "datasource": {"type": "tempo", "uid": TEMPO_UID},
        "queryType": "traceql",
        "query": TRACE_ID_PLACEHOLDER,
    }
    pane = {"datasource": TEMPO_UID, "queries": [query], "range": {"from": "now-7d", "to": "now"}}
    panes = quote(json.dumps({"t": pane}, separators=(",", ":"))).replace(
        quote(TRACE_ID_PLACEHOLDER), TRACE_ID_PLACEHOLDER
    )
    return f"{url.rstrip('/')}/explore?schemaVersion=1&orgId=1&panes={panes}"


def load_token(environment: dict[str, str], file: Path | None) -> str:
    """Load the token that permits commands from the dashboard; empty if there is none.

    Raises:
        InvalidSetting: *file* cannot be read, or the token is too short.

    """
    token = environment.get(TOKEN, "").strip()
    if not token and file is not None:
        try:
            token = file.read_text().strip()
        except OSError as error:
            raise InvalidSetting(f"{TOKEN_FILE}: {file}: {error.strerror}") from None
    if token and len(token) < MIN_TOKEN_LENGTH:
        raise InvalidSetting(
            f"{TOKEN}: {len(token)} characters (minimum {MIN_TOKEN_LENGTH}). "
            "Create a token with `openssl rand -hex 16`"
        )
    return token
