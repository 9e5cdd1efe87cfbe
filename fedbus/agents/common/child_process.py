"""Child processes that never outlive their parent.

    async with ChildProcess("trainer", *module_command("my_package.trainer", run), output=log) as trainer:
        code = await trainer.wait()

Leaving the block ends the child: it gets SIGTERM, and after *stop_s* SIGKILL, together with all processes that it
started. If the parent itself is killed, the child still ends: the parent holds the other end of the child's standard
input, which the system then closes, and `exit_when_parent_dies`, called first in the child, waits for that.

A child is the leader of its own session, so that Ctrl-C in a terminal reaches only the parent, which then ends its
children in its own order.

A child returns a result to its parent by `write_answer`, through a private file. The log is not suitable for that:
libraries write to it too, even after the child's own last line.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from opentelemetry import propagate
from opentelemetry.context import Context

from fedbus.contracts.causation import current_cause

STOP_S: Final = 10.0
GRACE_S: Final = 5.0
"""The time for a clean shutdown of a child whose parent is gone; then it exits at once."""
MAX_LINE_BYTES: Final = 64 * 1024
DRAIN_OUTPUT_S: Final = 1.0
LOG_TAIL_BYTES: Final = 8 * 1024
ANSWER_VARIABLE: Final = "FEDBUS_ANSWER"
"""The environment variable with the path of the file for the child's answer."""
MAX_ANSWER_BYTES: Final = 64 * 1024
ORPHANED_EXIT_CODE: Final = 70
"""The exit code of a child that did not shut down after its parent was gone."""

CAUSE_VARIABLE: Final = "FEDBUS_CAUSE"

Output = Path | Callable[[str], None] | None
"""Where a child's output goes: appended to a file, passed to a function line by line, or to our own output."""


class ChildNotStarted(Exception):
    """The program could not be started; the text contains its name and the cause."""


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs *module* with this Python."""
    return (sys.executable, "-m", module, *arguments)


class ChildProcess:
    """A child process for the duration of a block."""

    def __init__(
        self,
        name: str,
        *command: str,
        environment: Mapping[str, str] | None = None,
        output: Output = None,
        stop_s: float = STOP_S,
        inherited_fds: Sequence[int] = (),
    ) -> None:
        """Prepare the process. *inherited_fds* are open file descriptors that the child gets by the same numbers."""
        self.name = name
        self._command = command
        self._environment = dict(environment or {})
        self._output = output
        self._stop_s = stop_s
        self._inherited_fds = inherited_fds
        self._output_protocol = _OutputProtocol(output if callable(output) else None)
        self._transport: asyncio.SubprocessTransport | None = None
        self._is_group_killed = False
        self._answers: IO[bytes]
        self.answer = ""
        """The child's answer; known after it has ended."""

    @property
    def pid(self) -> int:
        pid = self._transport_or_fail.get_pid()
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs, negative for the signal that ended it."""
        return self._transport_or_fail.get_returncode()

    async def wait(self) -> int:
        """Wait until it ends, and kill the processes that it left running."""
        await self._output_protocol.exited.wait()
        self._kill_group()
        try:
            with suppress(TimeoutError):  # a process that left the group may keep the output open
                async with asyncio.timeout(DRAIN_OUTPUT_S):
                    await self._output_protocol.output_closed.wait()
        finally:
            self._transport_or_fail.close()
            self._read_answer()
        assert self.returncode is not None
        return self.returncode

    async def stop(self) -> int:
        """Terminate it; after *stop_s* kill it, with all processes that it started."""
        try:
            async with asyncio.timeout(self._stop_s):
                self._terminate()
                await self._output_protocol.exited.wait()
        except TimeoutError:
            pass
        finally:  # at once if we are cancelled while waiting
            self._kill_group()
            try:
                await _wait_despite_cancellation(self._output_protocol.exited)
            finally:
                code = await self.wait()
        return code

    def log_tail(self, lines: int = 3) -> str:
        """Return the last *lines* of its log, on one line."""
        return log_tail(self._output, lines) if isinstance(self._output, Path) else ""

    def describe_exit(self) -> str:
        """Describe how it ended and why: by its answer, or without one by the last line of its log."""
        ended, reason = describe_exit(self.returncode or 0), self.answer or self.log_tail(1)
        return f"{ended}: {reason}" if reason else ended

    async def __aenter__(self) -> Self:
        self._answers = tempfile.TemporaryFile()  # noqa: SIM115  # open until the child has ended
        with _open_output(self._output) as (stdout, stderr):
            try:
                self._transport, _ = await asyncio.get_running_loop().subprocess_exec(
                    lambda: self._output_protocol,
                    *self._command,
                    stdin=subprocess.PIPE,
                    stdout=stdout,
                    stderr=stderr,
                    env=os.environ | trace_environment() | self._environment | self._answer_environment(),
                    pass_fds=[self._answers.fileno(), *self._inherited_fds],
                    start_new_session=True,
                )
            except BaseException as error:
                self._answers.close()
                if isinstance(error, OSError):
                    raise ChildNotStarted(f"cannot start {self.name}: {error}") from None
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def _transport_or_fail(self) -> asyncio.SubprocessTransport:
        assert self._transport is not None, f"{self.name} was not started"
        return self._transport

    def _answer_environment(self) -> dict[str, str]:
        return {ANSWER_VARIABLE: f"/dev/fd/{self._answers.fileno()}"}

    def _read_answer(self) -> None:
        if not self._answers.closed:
            self._answers.seek(0)
            self.answer = self._answers.read(MAX_ANSWER_BYTES).decode(errors="replace")
            self._answers.close()

    def _terminate(self) -> None:
        with suppress(ProcessLookupError):
            self._transport_or_fail.terminate()

    def _kill_group(self) -> None:
        """Kill the child's process group: the child is its leader, so this includes processes that it left running."""
        if self._is_group_killed:  # the id may already belong to another process
            return
        self._is_group_killed = self.returncode is not None
        with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a group of zombies
            os.killpg(self.pid, signal.SIGKILL)


class _OutputProtocol(asyncio.SubprocessProtocol):
    """Receives the output of a child, line by line, and its end.

    The ``wait`` of asyncio's own Process lasts until every pipe is closed, so as long as any process that the child
    has left behind.
    """

    def __init__(self, sink: Callable[[str], None] | None) -> None:
        self.exited = asyncio.Event()
        self.output_closed = asyncio.Event()
        self._sink = sink
        self._partial_line = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002  # asyncio's signature
        """Emit every complete line; one longer than MAX_LINE_BYTES is emitted in pieces."""
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if len(self._partial_line) > MAX_LINE_BYTES:
            lines, self._partial_line = [*lines, self._partial_line], b""
        for line in lines:
            self._emit_line(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002  # the same
        if fd != 0:
            self._drain_output()

    def process_exited(self) -> None:
        self.exited.set()
        if self._sink is None:
            self.output_closed.set()

    def _drain_output(self) -> None:
        if self._partial_line:
            self._emit_line(self._partial_line)
        self._partial_line = b""
        self.output_closed.set()

    def _emit_line(self, line: bytes) -> None:
        if self._sink is not None:
            self._sink(line.decode(errors="replace"))


async def _wait_despite_cancellation(event: asyncio.Event) -> None:
    """Wait for *event*, and raise a cancellation only afterwards.

    A killed process ends soon, and must not outlive the event loop. A shielded task would not help: a loop that
    closes cancels it too.
    """
    cancelled: asyncio.CancelledError | None = None
    while not event.is_set():
        try:
            await event.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


@contextmanager
def _open_output(output: Output) -> Iterator[tuple[int | IO[bytes] | None, int | None]]:
    """Yield stdout and stderr for the child; a file is open only while the child starts."""
    if isinstance(output, Path):
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            yield file, subprocess.STDOUT
    elif output is not None:
        yield subprocess.PIPE, subprocess.STDOUT
    else:
        yield None, None


def log_tail(log: Path, lines: int = 3) -> str:
    """Return the last *lines* of *log* that are not empty, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in tail if line.strip()][-lines:])


def describe_exit(returncode: int) -> str:
    """Describe an exit code: ``ended with code 1``, ``was killed (SIGKILL, possibly out of memory)``."""
    if returncode >= 0:
        return f"ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed ({name}{', possibly out of memory' if name == 'SIGKILL' else ''})"


# --- the child's side ------------------------------------------------------------------


def exit_when_parent_dies(*, grace_s: float = GRACE_S) -> threading.Thread:
    """End this process when its parent is gone: by SIGTERM to itself, and after *grace_s* at once.

    A thread, not a task, so that it works even while torch blocks the event loop.
    """
    lifeline = os.dup(0)
    _detach_stdin()
    thread = threading.Thread(target=_exit_on_eof, args=(lifeline, grace_s), name="parent watch", daemon=True)
    thread.start()
    return thread


def _detach_stdin() -> None:
    """Replace the standard input by an empty one, so that the processes that we start do not inherit the lifeline."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)


def _exit_on_eof(lifeline: int, grace_s: float) -> None:
    with suppress(OSError):  # a reset of the lifeline also means that the parent is gone
        while os.read(lifeline, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(ORPHANED_EXIT_CODE)


def write_answer(text: str) -> None:
    """Return *text* to the parent process; print it if the process was started by hand."""
    if ANSWER_VARIABLE in os.environ:
        Path(os.environ[ANSWER_VARIABLE]).write_bytes(text.encode())
    else:
        print(text, flush=True)


def exit_with_reason(reason: str) -> int:
    """Write *reason* to the log and return it to the parent; return the exit code."""
    print(reason, file=sys.stderr, flush=True)
    write_answer(reason)
    return 1


# --- trace propagation into a child process ------------------------------------------------


def trace_environment() -> dict[str, str]:
    """Return the current trace context and cause as environment variables.

    They are ``TRACEPARENT`` and ``FEDBUS_CAUSE``, and ``TRACESTATE`` if there is one.
    """
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name.upper(): value for name, value in carrier.items()} | {CAUSE_VARIABLE: current_cause()}


def parent_cause() -> str:
    """Return the id of the message that the parent was handling when it started this process."""
    return os.environ.get(CAUSE_VARIABLE, "")


def parent_trace() -> Context:
    """Return the trace context of the parent at the start of this process."""
    names = ("traceparent", "tracestate")
    return propagate.extract({name: os.environ[name.upper()] for name in names if name.upper() in os.environ})
