"""Run external programs (git, pip) from a thread, with a time limit, and stop them with the work they belong to.

Each program gets its own process group, so that its helpers (ssh, git-remote-https) end with it. It inherits the
file lock of the work: if this process is killed, the next one waits until the program has ended too.
"""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

MAX_OUTPUT_BYTES: Final = 16 * 1024**2
_REAP_S: Final = 5.0


@dataclass(frozen=True)
class ProcessResult:
    """The exit code and output of a program."""

    returncode: int
    stdout: bytes
    stderr: str

    @property
    def error_line(self) -> str:
        """The line of its error output that is most likely the reason."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("fatal:", "error:"))]
        return (errors or lines or [f"exit code {self.returncode}"])[-1][:500]


class SubprocessFailed(Exception):
    """A program could not be started, exceeded its time limit, or was stopped because its work was cancelled."""


class SubprocessRunner:
    """Runs the programs of one piece of work, one at a time; `end` may be called from any thread."""

    def __init__(self) -> None:
        self.inherited_fds: tuple[int, ...] = ()
        """File descriptors that a program inherits."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False

    @property
    def is_ended(self) -> bool:
        return self._is_ended

    def end(self) -> None:
        with self._lock:
            self._is_ended = True
            if self._process is not None:
                _kill_group(self._process)

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        timeout_s: float,
        cwd: Path | None = None,
    ) -> ProcessResult:
        """Run *command* to its end. Raises SubprocessFailed.

        The output goes to files: with a pipe, a helper that stays behind (a credential cache) would block the reader.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self.start(command, environment=environment, cwd=cwd, stdout=out, stderr=err) as program:
                try:
                    code = program.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    raise SubprocessFailed(
                        f"{command[0]} did not end in time (limit {timeout_s:.0f} s)"
                    ) from None
            self._check_not_ended()
            return ProcessResult(code, _read_stderr(out), _read_stderr(err).decode(errors="replace"))

    @contextmanager
    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.DEVNULL,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run *command* while the block runs. Raises SubprocessFailed."""
        with self._lock:
            self._check_not_ended()
            try:
                program = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=cwd,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=self.inherited_fds,
                    start_new_session=True,
                )
            except OSError as error:
                raise SubprocessFailed(f"cannot start {command[0]}: {error.strerror}") from None
            self._process = program
        try:
            yield program
        finally:
            self._reap(program)

    def _reap(self, program: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._process = None
            _kill_group(program)
        for pipe in (program.stdin, program.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        program.wait(timeout=_REAP_S)

    def _check_not_ended(self) -> None:
        if self._is_ended:
            raise SubprocessFailed("the work was cancelled")


def _kill_group(program: subprocess.Popen[bytes]) -> None:
    """Kill the program and its helpers, which would keep the lock."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)


def _read_stderr(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES)
