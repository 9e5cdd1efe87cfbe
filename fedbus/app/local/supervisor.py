"""Programs that fedbus starts, watches and stops for itself, each in a directory of its own.

    async with kept(program) as running:
        ...  # it answers, and will again if it dies

They listen on the loopback interface only. Their ports are chosen once and kept in the directory,
so that whoever was connected finds them again after a restart, ours or their own. A program
that dies is started again on the same ports, later each time; when it keeps dying, the
block is cancelled and `KeepsDying` says what its log said. It can not outlive us,
however we end: see `tether`.

What a program is, and how one sees that it answers, is said by a `Program`: see `embedded` for
the nats-server and `embedded_s3` for SeaweedFS.
"""

import asyncio
import fcntl
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

import structlog

from fedbus.agents.common.child_process import ChildProcess, describe_exit, log_tail
from fedbus.app.local import orphan_guard

HOST: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 60.0
"""A store that was not closed is read through at the start, on slow disks for a while."""
STOP_TIMEOUT_S: Final = 10.0
QUICK_EXIT_S: Final = 5.0
MAX_QUICK_EXITS: Final = 5
FIRST_BACKOFF_S: Final = 0.1
POLL_S: Final = 0.02
PORT_TRIES: Final = 5
IN_USE: Final = "address already in use"

log = structlog.get_logger("fedbus.keeper")


class EmbeddedError(Exception):
    """An embedded program cannot run; the text says what to do."""


class ProgramMissing(EmbeddedError):
    def __init__(self, name: str, instead: str) -> None:
        super().__init__(f"no {name} beside {sys.executable} nor on PATH: {instead}")


class PortTaken(EmbeddedError):
    def __init__(self, port: int, instead: str = "choose another port") -> None:
        super().__init__(
            f"port {port} is taken: stop what listens there (see: lsof -i :{port}), or {instead}"
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
    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(
            f"another fedbus keeps its {name} in {directory}: use that one, "
            "or set FEDBUS_HOME to another directory"
        )


class ProgramNotReady(EmbeddedError):
    """It was started and did not come to answer."""

    def __init__(self, name: str, what: str, home: "ProgramDirectory") -> None:
        super().__init__(f"{name} {what}. Its log ({home.log}) ends: {home.last_words()}")
        self.what = what


class CrashLooping(EmbeddedError):
    def __init__(self, name: str, deaths: int, home: "ProgramDirectory") -> None:
        super().__init__(
            f"{name} died {deaths} times in a row, within {QUICK_EXIT_S:g} s of its start. "
            f"Its log ({home.log}) ends: {home.last_words()}"
        )


@dataclass
class RunningProgram:
    """A program that answers on *port*, and will again if it dies."""

    port: int
    pid: int = field(default=0, compare=False, kw_only=True)
    """The process of the moment."""
    starts: int = field(default=0, compare=False, kw_only=True)


RunningT = TypeVar("RunningT", bound=RunningProgram)


class Program(Protocol[RunningT]):
    """What the keeper must know of a program."""

    @property
    def name(self) -> str: ...

    @property
    def home(self) -> "ProgramDirectory": ...

    @property
    def environment(self) -> Mapping[str, str]: ...

    def placed(self, port: int | None) -> RunningT:
        """Where it is to listen: on *port*, or where it did before, or on ports that are free."""

    def command(self, running: RunningT) -> tuple[str, ...]:
        """How it is started there; writes what it reads at its start."""

    async def answers(self, running: RunningT) -> bool:
        """Whether it is there, is ours, and does its work."""


@asynccontextmanager
async def supervised(program: Program[RunningT], port: int | None = None) -> AsyncIterator[RunningT]:
    """*program* at work on *port*, or one that is free, for as long as the block runs.

    Raises an EmbeddedError: at the start, or out of the block when the program keeps dying.
    """
    check_writable(program.home.directory)
    with program.home.locked(program.name):
        keeper = _Supervisor(program)
        running = await keeper.start_first(port)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(keeper.keep_alive(running), name=f"watch {program.name}")
                try:
                    yield running
                finally:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            if len(failures.exceptions) > 1:
                raise
            raise failures.exceptions[0] from None  # the block's own error, or the one of the watch
        finally:
            await keeper.stop()


def find_program(name: str) -> Path | None:
    """The program *name*: the one installed with fedbus, else the one on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    return Path(found) if found else None


def check_writable(directory: Path) -> None:
    """See that files can be written in *directory*, made if it is not there; raises NotWritable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise NotWritable(directory, error.strerror or str(error)) from None


# --- starting and watching -----------------------------------------------------------------


class _Supervisor(Generic[RunningT]):
    """Starts the program, and again when it dies."""

    def __init__(self, program: Program[RunningT]) -> None:
        self._program = program
        self._home = program.home
        self._child: ChildProcess | None = None

    async def start_first(self, port: int | None) -> RunningT:
        """On *port*, or on one that is free, chosen again when somebody else was quicker."""
        for tries_left in reversed(range(PORT_TRIES)):
            running = self._program.placed(port)
            try:
                await self._start(running)
            except ProgramNotReady:
                if IN_USE not in self._home.last_words() or tries_left == 0:
                    raise
            else:
                self._home.keep_port(running.port)
                return running
        raise AssertionError("the last try raises")

    async def keep_alive(self, running: RunningT) -> None:
        """Start it again whenever it dies; raises KeepsDying when that does not help."""
        assert self._child is not None
        quick_deaths = 0
        while True:
            started = time.monotonic()
            how = describe_exit(await self._child.ended())
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < QUICK_EXIT_S else 1
            quick_deaths = await self._start_again(running, how, quick_deaths)

    async def _start_again(self, running: RunningT, how: str, quick_deaths: int) -> int:
        """Try until it answers; how many quick deaths there have been by then."""
        while quick_deaths < MAX_QUICK_EXITS:
            log.warning("started again", program=self._program.name, how=how, deaths=quick_deaths)
            await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (quick_deaths - 1))
            try:
                await self._start(running)
            except ProgramNotReady as failure:
                how, quick_deaths = failure.what, quick_deaths + 1
            else:
                return quick_deaths
        raise CrashLooping(self._program.name, quick_deaths, self._home)

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()

    async def _start(self, running: RunningT) -> None:
        """The program, answering as ours; raises NotReady."""
        self._home.output.unlink(missing_ok=True)
        command = (*orphan_guard.wrapper_command(), *self._program.command(running))
        child = ChildProcess(
            self._program.name,
            *command,
            environment=self._program.environment,
            output=self._home.output,
            stop_s=STOP_TIMEOUT_S,
        )
        self._child = await child.__aenter__()
        try:
            await self._ready(child, running)
        except BaseException:
            await child.stop()
            raise
        running.pid, running.starts = child.pid, running.starts + 1

    async def _ready(self, child: ChildProcess, running: RunningT) -> None:
        name = self._program.name
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._program.answers(running):
                    if child.returncode is not None:
                        raise ProgramNotReady(name, describe_exit(child.returncode), self._home)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ProgramNotReady(name, f"did not answer within {READY_TIMEOUT_S:g} s", self._home) from None


async def read_reply(port: int, request: bytes, *, end: bytes) -> bytes:
    """What comes first on *port*, as far as *end*; nothing where nobody listens."""
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


class ProgramDirectory:
    """What a program has on disk. *short* begins the names of its files."""

    def __init__(self, directory: Path, short: str) -> None:
        self.directory = directory = directory.absolute()
        self.log = directory / f"{short}.log"
        self.output = directory / f"{short}.out"
        self._port = directory / "port"

    @property
    def kept_port(self) -> int | None:
        try:
            return int(self._port.read_text())
        except (OSError, ValueError):
            return None

    def keep_port(self, port: int) -> None:
        self._port.write_text(f"{port}\n")

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One fedbus at a time: two programs over one store would ruin it. Raises AlreadyRunning."""
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(name, self.directory) from None
            yield

    def last_words(self) -> str:
        """What it said on its way out: complaints about its settings go to its output, the rest to its log."""
        said = [log_tail(self.output), log_tail(self.log, 2)]
        return " | ".join(line for line in said if line) or "(nothing)"


# --- ports ---------------------------------------------------------------------------------------


def choose_port(asked: int | None, kept: int | None) -> int:
    """The port that was *asked* for, else the one *kept* from before, else one that is free; raises PortTaken."""
    if asked is not None:
        if not is_port_free(asked):
            raise PortTaken(asked)
        return asked
    return kept if kept is not None and is_port_free(kept) else find_free_port()


def bind_port(port: int) -> socket.socket:
    """A socket that holds *port* from here on, 0: one that is free; raises PortTaken."""
    try:
        return socket.create_server((HOST, port))
    except OSError:
        raise PortTaken(port) from None


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left lately is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
