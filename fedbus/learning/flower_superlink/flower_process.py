"""A SuperLink, a SuperNode or a check of the app as a child process, which ends with this process.

It has a process group of its own.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from fedbus.learning.flower_superlink import child

STOP_S: Final = 5.0
"""The limit of time for a clean shutdown; then the process group is killed."""
TAIL_LINES: Final = 40
REASON_LINES: Final = 4
"""The last lines of the output that an error repeats."""
MAX_REASON_CHARS: Final = 600

_ANSI_CODE: Final = re.compile(r"\x1b\[[0-9;]*m")
_INFO_LINE: Final = re.compile(r"INFO\b|\S+ INFO \[")
"""A line of Flower's log, or of uvicorn's in it, that reports no problem."""

log = structlog.get_logger("fedbus.learning")


class FlowerProcess:
    """A program of `child` (``superlink``, ``supernode`` or ``check``) for the duration of a block.

    *directory* is for the files of the run, Flower's own included. If this process dies, the program removes it.
    `printed` has those of *markers* that its output contains. Once it contains all of *end_markers*, the program cannot
    continue, and is killed.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        stop_s: float = STOP_S,
        markers: Collection[str] = (),
        end_markers: Collection[str] = (),
    ) -> None:
        self.program = program
        self._stop_s = stop_s
        self._markers = frozenset((*markers, *end_markers))
        self._end_markers = frozenset(end_markers)
        self.printed: set[str] = set()
        self._arguments = arguments
        self._environment = {**flower_environment(directory), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._read_output, name=f"{program} output", daemon=True)

    @property
    def is_running(self) -> bool:
        return self._process is not None and not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.returncode if self._process else None

    def wait(self, timeout_s: float) -> bool:
        """Wait until it ends, at most *timeout_s*. Return whether it has ended."""
        return self._ended.wait(timeout_s)

    def describe_exit(self) -> str:
        """Describe how it ended, with the last lines of its output that report a problem, on one line.

        Without such a line, an exit code is followed by the last lines of any kind; a signal explains itself.
        """
        code = self.exit_code
        how = (
            f"killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        printed = [line for line in self._tail if line]
        lines = [line for line in printed if not _INFO_LINE.match(line)]
        if not lines and (code is None or code >= 0):
            lines = printed
        lines = lines[-REASON_LINES:]
        return f"{how}: {' '.join(' '.join(lines).split())[-MAX_REASON_CHARS:]}" if lines else how

    def start(self) -> Self:
        command = [
            sys.executable,
            "-m",
            child.__name__,
            self.program,
            *self._arguments,
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        self._watch.start()
        log.info("Flower process started", program=self.program, pid=self._process.pid)
        return self

    def stop(self) -> None:
        """End it with all processes that it started."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        self._ended.wait(self._stop_s)
        self._kill_group()
        self._ended.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read_output(self) -> None:
        """Copy the output to the standard error of this process, which is its log."""
        assert self._process is not None
        assert self._process.stdout is not None
        threading.Thread(target=self._wait, name=f"{self.program} end", daemon=True).start()
        with self._process.stdout as output:
            for line in output:
                text = _ANSI_CODE.sub("", line.decode(errors="replace")).rstrip()
                self._tail.append(text)
                self.printed |= {marker for marker in self._markers if marker in text}
                sys.stderr.write(f"{self.program}: {text}\n")
                if self._end_markers and self._end_markers <= self.printed:
                    self._kill_group()

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._kill_group()  # the processes that it left running hold its output open
        if self._process.stdin:
            self._process.stdin.close()
        self._watch.join(timeout=1.0)
        log.info("Flower process ended", program=self.program, exit_code=self._process.returncode)
        self._ended.set()

    def _kill_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)


def flower_environment(directory: Path) -> dict[str, str]:
    """Return the environment of Flower's programs, which are next to this Python: no telemetry, no update check."""
    return {
        **os.environ,
        child.DIRECTORY_VARIABLE: str(directory),
        "FLWR_HOME": str(directory / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }


def find_free_port(host: str) -> int:
    """Return a free TCP port of *host*, an address of this machine."""
    with socket.create_server((host, 0), family=family_of(host)) as server:
        return int(server.getsockname()[1])


def family_of(host: str) -> socket.AddressFamily:
    """Return the address family of *host*, which is an IP address or a name."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
