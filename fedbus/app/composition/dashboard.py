"""The dashboard put together: the gateway, its bus, and where it reads of models."""

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
"""The uid of the data source, in deploy/observability/provisioning."""
STORE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True)
class Dashboard:
    """How the dashboard is to be served."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 0
    hosts: Sequence[str] = ()
    """Other names that it is known by."""
    trace_url: str = ""
    """Leads to a trace: ``http://jaeger/trace/{trace_id}``, or where Grafana is."""
    token: str = ""
    certificate: Path | None = None
    key: Path | None = None
    """With both it is served by HTTPS."""
    insecure: bool = False
    """Whether others may reach it without HTTPS or a token, because something else keeps them out."""
    bound_socket: socket.socket | None = None
    """Bound and held by whoever keeps us, so that nobody else is where it is said to be."""

    async def serve(self, stop: asyncio.Event) -> None:
        """Until *stop*; raises CannotListen, BadSetting, and BusClosed where the bus is gone for good."""
        self.check_access()
        settings = self.settings
        identity = Identity(settings.fed, AgentName.GATEWAY)
        async with (
            Bus.connect(settings.nats_url, identity, access=settings.access) as bus,
            bus.advertise_service(task="every", version=__version__),
        ):
            guard = AccessControl([self.host, *self.hosts], self.token)
            gateway = Gateway(
                bus,
                guard,
                models=self.models,
                trace_url=trace_url_template(self.trace_url),
                host=self.host,
                port=self.port,
                tls=self.tls,
                listening=self.bound_socket,
            )
            await wait_for_first(gateway.run(stop), bus.lost(), self._print_url(gateway))

    def check_access(self) -> None:
        """Raises BadSetting where others could reach a dashboard that asks nobody who they are."""
        safe = self.token and self.certificate is not None
        if self.host in LOOPBACK or safe or self.insecure:
            return
        raise InvalidSetting(
            f"FEDBUS_GATEWAY_HOST: others can reach {self.host}: set FEDBUS_GATEWAY_TOKEN and give --certificate and "
            "--key, or listen on 127.0.0.1; --insecure if something else keeps others out"
        )

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What makes it HTTPS; raises BadSetting."""
        if self.certificate is None and self.key is None:
            return None
        if self.certificate is None or self.key is None:
            raise InvalidSetting("FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: set both, or neither")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError:
            raise InvalidSetting(
                f"FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: {self.certificate} and {self.key} do not belong "
                "together, or are none"
            ) from None
        except OSError as error:
            raise InvalidSetting(f"FEDBUS_GATEWAY_CERT, FEDBUS_GATEWAY_KEY: {error.strerror}") from None
        return context

    async def _print_url(self, gateway: Gateway) -> None:
        print(f"the dashboard is on {await asyncio.shield(gateway.url)}", flush=True)
        await asyncio.Event().wait()

    async def models(self, task: str) -> dict[str, Any]:
        """The versions of *task* in the model repository, or why they cannot be read."""
        try:
            store = open_model_store(self.settings.store_url, task, patience_s=STORE_TIMEOUT_S)
            versions, champion = await asyncio.gather(store.versions(), store.champion())
        except (StoreError, BadId) as error:
            return {"store": "", "versions": [], "champion": None, "error": str(error)}
        return {
            "store": store.url.partition("?")[0],
            "versions": [one.model_dump(mode="json") for one in versions],
            "champion": champion.model_dump(mode="json") if champion else None,
            "error": "",
        }


def trace_url_template(url: str) -> str:
    """Where a trace is looked at, with ``{trace_id}`` in it; without, *url* is Grafana's address."""
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
    """The token that lets people act, or nothing; raises BadSetting."""
    token = environment.get(TOKEN, "").strip()
    if not token and file is not None:
        try:
            token = file.read_text().strip()
        except OSError as error:
            raise InvalidSetting(f"{TOKEN_FILE}: {file}: {error.strerror}") from None
    if token and len(token) < MIN_TOKEN_LENGTH:
        raise InvalidSetting(
            f"{TOKEN}: a token of {len(token)} characters is guessed: take {MIN_TOKEN_LENGTH} or more, "
            "as `openssl rand -hex 16` gives them"
        )
    return token
