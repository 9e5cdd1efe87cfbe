"""A real nats-server with JetStream, on a free port, that a test may kill and start again."""

import asyncio
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from support.ports import free_port
from support.waiting import eventually

CONFIG = """
listen: "127.0.0.1:{port}"
max_payload: 8MB
max_pending: 256MB
jetstream {{ store_dir: "{store}", sync_interval: always }}
"""


class NatsServer:
    """One nats-server; its port and its store outlive its process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> None:
        program = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
        config = self._directory / "nats.conf"
        config.write_text(CONFIG.format(port=self._port, store=self._directory / "jetstream"))
        log = self._directory / "nats.log"
        self._process = await asyncio.create_subprocess_exec(program, "-c", str(config), "-l", str(log))
        await eventually(self._answers)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(how)
            await self._process.wait()

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        greeting = await reader.readline()
        writer.close()
        return greeting.startswith(b"INFO")


@asynccontextmanager
async def nats_server(directory: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(directory)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
