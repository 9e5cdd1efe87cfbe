"""The supervisor of embedded programs: nats-server and SeaweedFS.

    async with supervised(program) as running:
        ...  # it is ready, and is restarted if it dies

Each program has a directory and listens on the loopback interface only. The directory keeps its port, so that
clients reconnect after a restart of the program or of fedbus. A program that dies is restarted on the same ports,
with backoff. If it crashes again and again, the block is cancelled and `CrashLooping` has the end of its log. A program
ends with this process, even if this process is killed: see `orphan_guard`.

A `Program` has the command and the readiness check: see `nats_server` and `seaweedfs`.
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
from fedbus.common.retry import backoff_s

HOST: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 60.0
"""After a crash, nats-server reads its whole store at the start, which takes long on a slow disk."""
STOP_TIMEOUT_S: Final = 10.0
QUICK_EXIT_S: Final = 5.0
MAX_QUICK_EXITS: Final = 5
FIRST_BACKOFF_S: Final = 0.1
POLL_S: Final = 0.02
PORT_TRIES: Final = 5
IN_USE: Final = "address already in use"

log = structlog.get_logger("fedbus.supervisor")


class EmbeddedError(Exception):
    """An embedded program cannot run; the message has the cause and what to do."""


class ProgramMissing(EmbeddedError):
    def __init__(self, name: str, advice: str) -> None:
        super().__init__(f"{name} is not installed next to {sys.executable} nor on PATH. {advice}")


class PortTaken(EmbeddedError):
    def __init__(self, port: int, advice: str = "choose another port") -> None:
        super().__init__(
            f"port {port} is taken. Stop the process that listens there (see: lsof -i :{port}), or {advice}"
        )
        self.port = port


class NotWritable(EmbeddedError):
    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"cannot write to {directory}: {reason}. Make the directory writable for this user, "
            "or set FEDBUS_HOME to another directory"
        )
        self.directory = directory


class AlreadyRunning(EmbeddedError):
    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(
            f"another fedbus process runs {name} in {directory}. Use that one, "
            "or set FEDBUS_HOME to another directory"
        )


class ProgramNotReady(EmbeddedError):
    """The program was started and did not become ready."""

    def __init__(self, name: str, problem: str, home: "ProgramDirectory") -> None:
        super().__init__(f"{name} {problem}. Its log ({home.log}) ends: {home.log_tail()}")
        self.problem = problem


class CrashLooping(EmbeddedError):
    def __init__(self, name: str, exits: int, home: "ProgramDirectory") -> None:
        super().__init__(
            f"{name} exited {exits} times in a row within {QUICK_EXIT_S:g} s of its start. "
            f"Its log ({home.log}) ends: {home.log_tail()}"
        )


@dataclass
class RunningProgram:
    """A program that listens on *port*, and is restarted if it dies."""

    port: int
    pid: int = field(default=0, compare=False, kw_only=True)
    """Of the current process; a restart changes it."""
    starts: int = field(default=0, compare=False, kw_only=True)


RunningT = TypeVar("RunningT", bound=RunningProgram)


class Program(Protocol[RunningT]):
    """A program that can be supervised."""

    @property
    def name(self) -> str: ...

    @property
    def home(self) -> "ProgramDirectory": ...

    @property
    def environment(self) -> Mapping[str, str]: ...

    def allocate_ports(self, port: int | None) -> RunningT:
        """Choose the ports: *port*, else those of the last start, else free ones."""

    def build_command(self, running: RunningT) -> tuple[str, ...]:
        """Write the configuration, and return the command."""

    async def is_ready(self, running: RunningT) -> bool:
        """Return whether it is ready, and is the program that we have started."""


@asynccontextmanager
async def supervised(program: Program[RunningT], port: int | None = None) -> AsyncIterator[RunningT]:
    """Run *program* on *port*, or a free one, until the block ends.

    Raises:
        EmbeddedError: It does not start, or later crashes again and again.

    """
    check_writable(program.home.directory)
    with program.home.lock(program.name):
        supervisor = _Supervisor(program)
        running = await supervisor.start_first(port)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(supervisor.keep_alive(running), name=f"watch {program.name}")
                try:
                    yield running
                finally:
                    watch.cancel()
        except BaseExceptionGroup as failures:
            if len(failures.exceptions) > 1:
                raise
            raise failures.exceptions[0] from None  # the block's own error, or the one of the watch
        finally:
            await supervisor.stop()


def find_program(name: str) -> Path | None:
    """Find the program *name* next to the Python interpreter, else on PATH."""
    installed = shutil.which(name, path=str(Path(sys.executable).parent))
    found = installed or shutil.which(name)
    return Path(found) if found else None


def check_writable(directory: Path) -> None:
    """Create *directory* if it does not exist, and check that it is writable.

    Raises:
        NotWritable: It is not.

    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise NotWritable(directory, error.strerror or str(error)) from None


# --- starting and watching -----------------------------------------------------------------


class _Supervisor(Generic[RunningT]):
    """Starts the program, and restarts it when it dies."""

    def __init__(self, program: Program[RunningT]) -> None:
        self._program = program
        self._home = program.home
        self._child: ChildProcess | None = None

    async def start_first(self, port: int | None) -> RunningT:
        """Start it on *port* or a free one; choose another free port if a process takes it in between."""
        for tries_left in reversed(range(PORT_TRIES)):
            running = self._program.allocate_ports(port)
            try:
                await self._start(running)
            except ProgramNotReady:
                if IN_USE not in self._home.log_tail() or tries_left == 0:
                    raise
            else:
                self._home.save_port(running.port)
                return running
        raise AssertionError("the last try raises")

    async def keep_alive(self, running: RunningT) -> None:
        """Restart it whenever it dies.

        Raises:
            CrashLooping: It exits again and again right after its start.

        """
        assert self._child is not None
        quick_exits = 0
        while True:
            started = time.monotonic()
            reason = describe_exit(await self._child.wait())
            quick_exits = quick_exits + 1 if time.monotonic() - started < QUICK_EXIT_S else 1
            quick_exits = await self._restart(running, reason, quick_exits)

    async def _restart(self, running: RunningT, reason: str, quick_exits: int) -> int:
        """Try until it is ready. The number of quick exits, including *quick_exits* before this call."""
        while quick_exits < MAX_QUICK_EXITS:
            log.warning(
                "Program exited; restarting", program=self._program.name, reason=reason, exits=quick_exits
            )
            await asyncio.sleep(backoff_s(quick_exits - 1, first_s=FIRST_BACKOFF_S))
            try:
                await self._start(running)
            except ProgramNotReady as failure:
                reason, quick_exits = failure.problem, quick_exits + 1
            else:
                return quick_exits
        raise CrashLooping(self._program.name, quick_exits, self._home)

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()

    async def _start(self, running: RunningT) -> None:
        """Start the program and wait until it is ready.

        Raises:
            ProgramNotReady: It exited, or READY_TIMEOUT_S has passed.

        """
        self._home.output.unlink(missing_ok=True)
        command = (*orphan_guard.wrapper_command(), *self._program.build_command(running))
        child = ChildProcess(
            self._program.name,
            *command,
            environment=self._program.environment,
            output=self._home.output,
            stop_s=STOP_TIMEOUT_S,
        )
        self._child = await child.__aenter__()
        try:
            await self._wait_until_ready(child, running)
        except BaseException:
            await child.stop()
            raise
        running.pid, running.starts = child.pid, running.starts + 1

    async def _wait_until_ready(self, child: ChildProcess, running: RunningT) -> None:
        name = self._program.name
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._program.is_ready(running):
                    if child.returncode is not None:
                        raise ProgramNotReady(name, describe_exit(child.returncode), self._home)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ProgramNotReady(name, f"was not ready within {READY_TIMEOUT_S:g} s", self._home) from None


async def read_reply(port: int, request: bytes, *, end: bytes) -> bytes:
    """Send *request* to *port* and read the reply up to *end*; empty if there is none."""
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
    """The files of a program; *short* is the prefix of their names."""

    def __init__(self, directory: Path, short: str) -> None:
        self.directory = directory = directory.absolute()
        self.log = directory / f"{short}.log"
        self.output = directory / f"{short}.out"
        self._port_file = directory / "port"

    @property
    def saved_port(self) -> int | None:
        try:
            return int(self._port_file.read_text())
        except (OSError, ValueError):
            return None

    def save_port(self, port: int) -> None:
        self._port_file.write_text(f"{port}\n")

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Lock the directory while the block runs: two programs would corrupt the store.

        Raises:
            AlreadyRunning: Another process has the lock.

        """
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(name, self.directory) from None
            yield

    def log_tail(self) -> str:
        """Return the end of its output, which has configuration errors, and of its log."""
        tails = [log_tail(self.output), log_tail(self.log, 2)]
        return " | ".join(tail for tail in tails if tail) or "(nothing)"


# --- ports ---------------------------------------------------------------------------------------


def choose_port(port: int | None, last_port: int | None) -> int:
    """Choose *port*, else *last_port* if it is free, else a free port.

    Raises:
        PortTaken: Another process has *port*.

    """
    if port is not None:
        if not is_port_free(port):
            raise PortTaken(port)
        return port
    return last_port if last_port is not None and is_port_free(last_port) else find_free_port()


def bind_port(port: int) -> socket.socket:
    """Bind a socket to *port*, 0 for a free one.

    Raises:
        PortTaken: Another process has *port*.

    """
    try:
        return socket.create_server((HOST, port))
    except OSError:
        raise PortTaken(port) from None


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
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
