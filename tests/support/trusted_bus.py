"""A federation with credentials, on a real nats-server with the configuration that `fedbus provision` writes.

async with trusted_bus(tmp_path) as bus:
    async with bus.connect(bus.access_for("c1")) as (client, complaints):
        await client.publish(...)
"""

import asyncio
import shutil
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats as nats_py
import pytest
from nats.aio.client import Client

from fedbus.app.failures import ExitCode, describe_error
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.bus.account_admin import push_account_jwts
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.permissions import Role
from support.ports import free_port
from support.waiting import eventually

FED = FederationId("test")
TRAINER = Identity(FED, "trainer", "c1")


class ConfiguredNatsServer:
    """A nats-server with a given configuration."""

    def __init__(self, config: Path, port: int) -> None:
        self.config = config
        self.port = port
        self._process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> Path:
        return self.config.with_suffix(".log")

    async def start(self) -> None:
        program = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
        arguments = ("-c", str(self.config), "-l", str(self.log))
        self._process = await asyncio.create_subprocess_exec(program, *arguments)
        await eventually(self._is_ready)

    async def stop(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    async def _is_ready(self) -> bool:
        assert self._process
        assert self._process.returncode is None, f"it ended: {self.log.read_text()[-2000:]}"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        greeting = await reader.readline()
        writer.close()
        return greeting.startswith(b"INFO")


class TrustedBus:
    """The keys of a federation, and its running nats-server."""

    def __init__(self, directory: Path, fed: FederationId = FED) -> None:
        self.directory = directory
        self.port = free_port()
        self.federation = Federation.create(
            directory / "trust",
            fed,
            hosts=["localhost"],
            port=self.port,
            url=f"tls://localhost:{self.port}",
        )
        self.url = self.federation.registry.url
        self.location = ServerLocation(
            self.federation.nats_folder, self.port, listen="127.0.0.1", monitor_port=free_port()
        )
        self.server = ConfiguredNatsServer(self.federation.write_server_files(self.location), self.port)

    def access_for(self, who: Role | str) -> BusAccess:
        """Credentials of a role, or of a client, which becomes a member if it is not yet."""
        if isinstance(who, Role):
            return BusAccess(self.federation.creds_path(who), self.federation.ca_path)
        kit = self.directory / "kits" / who
        if not kit.exists():
            self.federation.admit(who).write(kit)
        return BusAccess(kit / "client.creds", kit / "ca.pem")

    async def push(self) -> None:
        """Push the current claims to the server."""
        system = BusAccess(self.federation.creds_path("system"), self.federation.ca_path)
        await push_account_jwts(self.url, system, self.federation.account_jwts())

    @asynccontextmanager
    async def connect(
        self, access: BusAccess, *, inbox: str = "_INBOX", **options: Any
    ) -> AsyncIterator["tuple[Client, list[str]]"]:
        """Connect a plain NATS client, and yield it with the list of errors from the server."""
        complaints: list[str] = []

        async def complain(error: Exception) -> None:
            complaints.append(str(error))

        client = await nats_py.connect(
            self.url,
            error_cb=complain,
            inbox_prefix=inbox,
            allow_reconnect=False,
            connect_timeout=30,
            **(access.connect_options() | options),
        )
        try:
            yield client, complaints
        finally:
            await client.close()


@asynccontextmanager
async def trusted_bus(directory: Path, fed: FederationId = FED) -> AsyncIterator[TrustedBus]:
    bus = TrustedBus(directory, fed)
    await bus.server.start()
    try:
        yield bus
    finally:
        await bus.server.stop()


def tls_context(ca: Path) -> ssl.SSLContext:
    return BusAccess(ca=ca).tls_context()


async def rejected_connection(
    bus: TrustedBus, access: BusAccess, identity: Identity = TRAINER
) -> AccessDenied:
    """Connect with *access*, which the server has to reject, and return the error."""
    with pytest.raises(AccessDenied) as caught:
        async with Bus.connect(bus.url, identity, access=access):
            pass
    assert describe_error(caught.value)[1] is ExitCode.DENIED
    return caught.value
