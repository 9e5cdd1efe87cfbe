"""Real nats-servers with JetStream: an account on a shared server for most tests, a server for tests that stop it."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from support.ports import free_port
from support.waiting import eventually

LIMITS: Final = """
max_payload: 8MB
max_pending: 256MB
"""
DURABLE: Final = (
    """
listen: "127.0.0.1:{port}"
jetstream {{ store_dir: "{store}", sync_interval: always }}
"""
    + LIMITS
)
SHARED: Final = (
    """
listen: "127.0.0.1:{port}"
jetstream {{ store_dir: "{store}", max_file_store: 10TB, max_memory_store: 1TB }}  # streams reserve their limits
accounts {{
{accounts}
}}
"""
    + LIMITS
)
ACCOUNT: Final = '  {name} {{ jetstream: enabled, users: [ {{ user: "{name}", password: "{name}" }} ] }}'
ACCOUNTS: Final = 64
"""Accounts of one shared server. When all are used, a new server takes its place, so that its store stays small."""
STARTS_WITHIN_S: Final = 20.0


class NatsServer:
    """The address of a nats-server, or of an account on it."""

    def __init__(self, url: str) -> None:
        self.url = url


class OwnNatsServer(NatsServer):
    """A nats-server of one test, which may kill and restart it. It keeps its port and its store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        super().__init__(f"nats://127.0.0.1:{self._port}")

    async def start(self) -> None:
        config = self._directory / "nats.conf"
        config.write_text(DURABLE.format(port=self._port, store=self._directory / "jetstream"))
        self._process = await asyncio.create_subprocess_exec(*_command(config))
        await eventually(self._is_ready, within_s=STARTS_WITHIN_S)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(number)
            await self._process.wait()

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Stop the process with SIGSTOP until the block ends."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # until then it may still answer
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        greeting = await reader.readline()
        writer.close()
        return greeting.startswith(b"INFO")


@asynccontextmanager
async def nats_server(directory: Path) -> AsyncIterator[OwnNatsServer]:
    server = OwnNatsServer(directory)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class SharedNatsServer:
    """A nats-server for many tests. Each has an account, which isolates its streams and subjects."""

    def __init__(self, new_directory: Callable[[], Path]) -> None:
        self._new_directory = new_directory
        self._process: subprocess.Popen[bytes] | None = None
        self._unused: list[NatsServer] = []

    def new_account(self) -> NatsServer:
        """Return an account that no test has used."""
        if not self._unused:
            self.stop()
            self._unused = self._start()
        return self._unused.pop()

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()

    def _start(self) -> list[NatsServer]:
        directory, port = self._new_directory(), free_port()
        names = [f"test{number}" for number in range(ACCOUNTS)]
        accounts = "\n".join(ACCOUNT.format(name=name) for name in names)
        config = directory / "nats.conf"
        config.write_text(SHARED.format(port=port, store=directory / "jetstream", accounts=accounts))
        self._process = subprocess.Popen(_command(config))
        started = time.monotonic()
        while not _accepts(port):
            assert self._process.poll() is None, config.with_suffix(".log").read_text()
            assert time.monotonic() < started + STARTS_WITHIN_S, "nats-server did not start in time"
            time.sleep(0.01)
        return [NatsServer(f"nats://{name}:{name}@127.0.0.1:{port}") for name in names]


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            return connection.recv(4) == b"INFO"
    except OSError:
        return False


def _command(config: Path) -> tuple[str, ...]:
    program = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
    return (program, "-c", str(config), "-l", str(config.with_suffix(".log")))
