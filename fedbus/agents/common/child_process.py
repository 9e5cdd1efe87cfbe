"""Child processes that can never be left behind.

    async with ChildProcess("trainer", *python_module("my_package.trainer", run), output=log) as trainer:
        code = await trainer.ended()

Leaving the block ends the child: it is asked (SIGTERM), and killed with all that it started
when it has not gone after *stop_s*. Should the parent itself be killed, the child still
ends: the parent holds the other end of the child's standard input, which the system closes
for it, and `parent_watch`, called first thing in the child, waits for that.

A child leads a session of its own, so that Ctrl-C in a terminal reaches the parent alone,
which then ends its children in its own order.

What a child has to tell its parent it hands over by `answer`, in a file of the two alone. Its log is no
place for that: libraries write there too, even after the child's own last line.
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
"""How long a child whose parent has gone may take to say goodbye; then it ends at once."""
MAX_LINE_BYTES: Final = 64 * 1024
DRAIN_OUTPUT_S: Final = 1.0
LOG_TAIL_BYTES: Final = 8 * 1024
ANSWER_VARIABLE: Final = "FEDBUS_ANSWER"
"""Names, to a child, the file that takes its answer."""
MAX_ANSWER_BYTES: Final = 64 * 1024
ORPHANED_EXIT_CODE: Final = 70
"""Exit code of a child that had to be ended because its parent was gone."""

CAUSE_VARIABLE: Final = "FEDBUS_CAUSE"

Output = Path | Callable[[str], None] | None
"""Where a child's output goes: appended to a file, handed on line by line, or wherever ours goes."""


class ChildNotStarted(Exception):
    """The program could not be started; the text says which and why."""


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs *module* in this Python."""
    return (sys.executable, "-m", module, *arguments)


class ChildProcess:
    """One process of ours, for as long as a block runs."""

    def __init__(
        self,
        name: str,
        *command: str,
        environment: Mapping[str, str] | None = None,
        output: Output = None,
        stop_s: float = STOP_S,
        handed_down: Sequence[int] = (),
    ) -> None:
        """*handed_down*: open files of ours that are the child's too, by the same numbers."""
        self.name = name
        self._command = command
        self._environment = dict(environment or {})
        self._output = output
        self._stop_s = stop_s
        self._inherited_fds = handed_down
        self._output_protocol = _OutputProtocol(output if callable(output) else None)
        self._transport: asyncio.SubprocessTransport | None = None
        self._is_group_killed = False
        self._answers: IO[bytes]
        self.answer = ""
        """What it has handed over, known when it has ended."""

    @property
    def pid(self) -> int:
        pid = self._transport_or_fail.get_pid()
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        """How it ended, or None while it runs; negative: the signal that ended it."""
        return self._transport_or_fail.get_returncode()

    async def ended(self) -> int:
        """Wait for its end, whatever the cause; what it left running is killed."""
        await self._output_protocol.ended.wait()
        self._kill_group()
        try:
            with suppress(TimeoutError):  # who left its group may still hold its output
                async with asyncio.timeout(DRAIN_OUTPUT_S):
                    await self._output_protocol.silent.wait()
        finally:
            self._transport_or_fail.close()
            self._read_answer()
        assert self.returncode is not None
        return self.returncode

    async def stop(self) -> int:
        """Ask it to end, and kill it with all that it started when it has not gone after *stop_s*."""
        try:
            async with asyncio.timeout(self._stop_s):
                self._terminate()
                await self._output_protocol.ended.wait()
        except TimeoutError:
            pass
        finally:  # also when we are cancelled while we wait: then at once
            self._kill_group()
            try:
                await _wait_despite_cancellation(self._output_protocol.ended)
            finally:
                code = await self.ended()
        return code

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, on one line: what a person would look at first when it died."""
        return log_tail(self._output, lines) if isinstance(self._output, Path) else ""

    def describe_exit(self) -> str:
        """Its end in words, and why: what it answered, or where it died without a word the last line of its log."""
        ended, said = describe_exit(self.returncode or 0), self.answer or self.last_words(1)
        return f"{ended}: {said}" if said else ended

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
        """The child leads its group, so this reaches whatever it has left running as well."""
        if self._is_group_killed:  # the number may be another's by now
            return
        self._is_group_killed = self.returncode is not None
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(self.pid, signal.SIGKILL)


class _OutputProtocol(asyncio.SubprocessProtocol):
    """Hears what a child says, in lines, and when it ends.

    Not asyncio's own Process: its ``wait`` lasts until every pipe is closed, and so for as long as
    anything lives that the child has left behind.
    """

    def __init__(self, sink: Callable[[str], None] | None) -> None:
        self.ended = asyncio.Event()
        self.silent = asyncio.Event()
        self._sink = sink
        self._held = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002  # asyncio's signature
        """Hand on every line; one longer than MAX_LINE_BYTES comes in pieces."""
        *lines, self._held = (self._held + data).split(b"\n")
        if len(self._held) > MAX_LINE_BYTES:
            lines, self._held = [*lines, self._held], b""
        for line in lines:
            self._hand_on(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002  # the same
        if fd != 0:
            self._hear_out()

    def process_exited(self) -> None:
        self.ended.set()
        if self._sink is None:
            self.silent.set()

    def _hear_out(self) -> None:
        if self._held:
            self._hand_on(self._held)
        self._held = b""
        self.silent.set()

    def _hand_on(self, line: bytes) -> None:
        if self._sink is not None:
            self._sink(line.decode(errors="replace"))


async def _wait_despite_cancellation(event: asyncio.Event) -> None:
    """Wait for *event*, and only then heed a cancellation: what is killed ends soon, and must not outlive the loop.

    No task of its own, shielded: a loop that closes cancels that as well.
    """
    cancelled: asyncio.CancelledError | None = None
    while not event.is_set():
        try:
            await event.wait()
        except asyncio.CancelledError as again:
            cancelled = again
    if cancelled is not None:
        raise cancelled


@contextmanager
def _open_output(output: Output) -> Iterator[tuple[int | IO[bytes] | None, int | None]]:
    """What a child's output and error output are to be; a file is open for the moment of the start."""
    if isinstance(output, Path):
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            yield file, subprocess.STDOUT
    elif output is not None:
        yield subprocess.PIPE, subprocess.STDOUT
    else:
        yield None, None


def log_tail(log: Path, lines: int = 3) -> str:
    """The last *lines* of *log* that say something, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            said = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in said if line.strip()][-lines:])


def describe_exit(returncode: int) -> str:
    """An exit code in words: ``ended with code 1``, ``was killed (SIGKILL, perhaps for want of memory)``."""
    if returncode >= 0:
        return f"ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed ({name}{', perhaps for want of memory' if name == 'SIGKILL' else ''})"


# --- the child's side ------------------------------------------------------------------


def exit_when_parent_dies(*, grace_s: float = GRACE_S) -> threading.Thread:
    """End this process when its parent is gone: asked first, by SIGTERM to itself, then at once.

    A thread and not a task, so that it sees to it however long torch holds the loop.
    """
    lifeline = os.dup(0)
    _detach_stdin()
    watch = threading.Thread(target=_exit_on_eof, args=(lifeline, grace_s), name="parent watch", daemon=True)
    watch.start()
    return watch


def _detach_stdin() -> None:
    """Whatever this process starts gets an empty standard input, not a share of the life line."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _exit_on_eof(lifeline: int, grace_s: float) -> None:
    with suppress(OSError):  # a reset of the life line is an end of it
        while os.read(lifeline, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(ORPHANED_EXIT_CODE)


def write_answer(text: str) -> None:
    """Hand *text* to whoever started this process; where that is a person, print it."""
    if ANSWER_VARIABLE in os.environ:
        Path(os.environ[ANSWER_VARIABLE]).write_bytes(text.encode())
    else:
        print(text, flush=True)


def exit_with_reason(reason: str) -> int:
    """Answer *reason*, and leave it in the log for whoever looks there; the exit code to end with."""
    print(reason, file=sys.stderr, flush=True)
    write_answer(reason)
    return 1


# --- the trace, which does not pass into a process by itself --------------------------------


def trace_environment() -> dict[str, str]:
    """The current trace as environment variables, and on account of what there is something to do.

    ``TRACEPARENT`` and, where there is one, ``TRACESTATE``; ``FEDBUS_CAUSE``.
    """
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name.upper(): value for name, value in carrier.items()} | {CAUSE_VARIABLE: current_cause()}


def parent_cause() -> str:
    """The id of the message that the parent was handling when it started this process."""
    return os.environ.get(CAUSE_VARIABLE, "")


def parent_trace() -> Context:
    """The trace that the parent was in when it started this process."""
    names = ("traceparent", "tracestate")
    return propagate.extract({name: os.environ[name.upper()] for name in names if name.upper() in os.environ})
