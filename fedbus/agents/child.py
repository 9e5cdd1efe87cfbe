"""Child processes that can never be left behind.

    async with ChildProcess("trainer", *python_module("fedbus.learning.trainer", run), output=log) as trainer:
        code = await trainer.ended()

Leaving the block ends the child: it is asked (SIGTERM), and killed with all that it started
when it has not gone after *stop_s*. Should the parent itself be killed, the child still
ends: the parent holds the other end of the child's standard input, which the system closes
for it, and `parent_watch`, called first thing in the child, waits for that.

A child leads a session of its own, so that Ctrl-C in a terminal reaches the parent alone,
which then ends its children in its own order.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from opentelemetry import propagate
from opentelemetry.context import Context

STOP_S: Final = 10.0
GRACE_S: Final = 5.0
"""How long a child whose parent has gone may take to say goodbye; then it ends at once."""
MAX_LINE_BYTES: Final = 64 * 1024
LAST_WORDS_BYTES: Final = 8 * 1024
ORPHANED: Final = 70
"""Exit code of a child that had to be ended because its parent was gone."""

Output = Path | Callable[[str], None] | None
"""Where a child's output goes: appended to a file, handed on line by line, or wherever ours goes."""


class ChildNotStarted(Exception):
    """The program could not be started; the text says which and why."""


def python_module(module: str, *arguments: str) -> tuple[str, ...]:
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
    ) -> None:
        self.name = name
        self._command = command
        self._environment = dict(environment or {})
        self._output = output
        self._stop_s = stop_s
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._swept = False

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, or None while it runs; negative: the signal that ended it."""
        return self._started.returncode

    async def ended(self) -> int:
        """Wait for its end, whatever the cause; what it left running is killed."""
        code = await self._started.wait()
        self._kill_group()
        if self._pump is not None:
            await asyncio.shield(self._pump)
        return code

    async def stop(self) -> int:
        """Ask it to end, and kill it with all that it started when it has not gone after *stop_s*."""
        try:
            async with asyncio.timeout(self._stop_s):
                self._signal(signal.SIGTERM)
                await self._started.wait()
        except TimeoutError:
            pass
        finally:  # also when we are cancelled while we wait: then at once
            self._kill_group()
        return await asyncio.shield(self.ended())

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, on one line: what a person would look at first when it died."""
        if not isinstance(self._output, Path):
            return ""
        return last_words(self._output, lines)

    async def __aenter__(self) -> Self:
        with _opened(self._output) as (target, to_pipe):
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE if to_pipe else target,
                    stderr=asyncio.subprocess.STDOUT if to_pipe or target else None,
                    env=os.environ | trace_environment() | self._environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise ChildNotStarted(f"cannot start {self.name}: {error}") from None
        if self._process.stdout is not None and callable(self._output):
            self._pump = asyncio.create_task(
                _hand_on(self._process.stdout, self._output), name=f"output of {self.name}"
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def _started(self) -> asyncio.subprocess.Process:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def _signal(self, how: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._started.send_signal(how)

    def _kill_group(self) -> None:
        """The child leads its group, so this reaches whatever it has left running as well."""
        if self._swept:  # the number may be another's by now
            return
        self._swept = self._started.returncode is not None
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(self._started.pid, signal.SIGKILL)


class _opened:  # noqa: N801  # reads as the word it is: `with _opened(output) as …`
    """The file that a child's output goes to, open for the moment of its start."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._file: IO[bytes] | None = None

    def __enter__(self) -> tuple[IO[bytes] | None, bool]:
        if isinstance(self._output, Path):
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._output.open("ab")
        return self._file, callable(self._output)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


async def _hand_on(stream: asyncio.StreamReader, sink: Callable[[str], None]) -> None:
    """Every line of *stream* to *sink*; a line longer than MAX_LINE_BYTES comes in pieces."""
    held = b""
    while piece := await stream.read(MAX_LINE_BYTES):
        *lines, held = (held + piece).split(b"\n")
        if len(held) > MAX_LINE_BYTES:
            lines, held = [*lines, held], b""
        for line in lines:
            sink(line.decode(errors="replace"))
    if held:
        sink(held.decode(errors="replace"))


def last_words(log: Path, lines: int = 3) -> str:
    """The last *lines* of *log* that say something, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            said = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in said if line.strip()][-lines:])


def how_it_ended(returncode: int) -> str:
    """An exit code in words: ``ended with code 1``, ``was killed (SIGKILL, perhaps for want of memory)``."""
    if returncode >= 0:
        return f"ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed ({name}{', perhaps for want of memory' if name == 'SIGKILL' else ''})"


# --- the child's side ------------------------------------------------------------------


def parent_watch(*, grace_s: float = GRACE_S) -> threading.Thread:
    """End this process when its parent is gone: asked first, by SIGTERM to itself, then at once.

    A thread and not a task, so that it sees to it however long torch holds the loop.
    """
    lifeline = os.dup(0)
    _read_nothing_from_it()
    watch = threading.Thread(target=_end_with, args=(lifeline, grace_s), name="parent watch", daemon=True)
    watch.start()
    return watch


def _read_nothing_from_it() -> None:
    """Whatever this process starts gets an empty standard input, not a share of the life line."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _end_with(lifeline: int, grace_s: float) -> None:
    with suppress(OSError):  # a reset of the life line is an end of it
        while os.read(lifeline, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(ORPHANED)


# --- the trace, which does not pass into a process by itself --------------------------------


def trace_environment() -> dict[str, str]:
    """The current trace as environment variables: ``TRACEPARENT`` and, where there is one, ``TRACESTATE``."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name.upper(): value for name, value in carrier.items()}


def trace_of_parent() -> Context:
    """The trace that the parent was in when it started this process."""
    names = ("traceparent", "tracestate")
    return propagate.extract({name: os.environ[name.upper()] for name in names if name.upper() in os.environ})
