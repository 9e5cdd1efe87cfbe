"""Child processes of agents, forked from a process that has imported their modules.

The imports of a child process (Flower, pydantic, torch) take one to three seconds of CPU time, and the tests start
hundreds. So a fork server forks the children of agents. Such a child is a child of the test's process, with its own
environment, files, signals and session. Children start normally if agents are processes (tests/faults,
tests/journeys/test_demo_run.py, tests/app/local/test_stopping.py), and in tests with the fixture `real_children`.

The processes of `multiprocessing`'s fork server are children of that server, but an agent has to wait for its children.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

from fedbus.agents.common.child_process import module_command

COMMAND: Final = module_command("fedbus")
PROGRAM: Final = Path(__file__).with_name("fork_server_process.py")
PR_SET_CHILD_SUBREAPER: Final = 36

FORKED_COMMANDS: Final[dict[int, list[str]]] = {}
"""The command of each forked process: the operating system reports that of the fork server."""


@contextmanager
def forked_children() -> Iterator["ForkServer"]:
    """Fork the children of agents until the block ends."""
    server = ForkServer()
    execute: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(popen: Any, args: Any, *rest: Any) -> None:
        if server.is_enabled and isinstance(args, (list, tuple)) and tuple(args[: len(COMMAND)]) == COMMAND:
            server.execute(popen, list(args), *rest)
        else:
            execute(popen, args, *rest)

    with mock.patch.object(subprocess.Popen, "_execute_child", execute_child):
        try:
            yield server
        finally:
            server.stop()


class ForkServer:
    """The process that forks, started at first use."""

    def __init__(self) -> None:
        self.is_enabled = sys.platform == "linux"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Start children normally until the block ends."""
        with mock.patch.object(self, "is_enabled", False):
            yield

    def stop(self) -> None:
        if self._process and self._socket:
            self._socket.close()  # the process ends at the end of its input
            self._process.wait()

    def execute(
        self,
        popen: Any,
        args: list[str],
        executable: str | None,
        preexec_fn: Callable[[], Any] | None,
        close_fds: bool,
        pass_fds: tuple[int, ...],
        cwd: str | None,
        env: Mapping[str, str] | None,
        startupinfo: Any,
        creationflags: int,
        shell: bool,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        restore_signals: bool,
        gid: int | None,
        gids: Any,
        uid: int | None,
        umask: int,
        start_new_session: bool,
        process_group: int,
    ) -> None:
        """Replace `Popen._execute_child`: see the source of CPython."""
        assert preexec_fn is None
        standard = enumerate((p2cread, c2pwrite, errwrite))
        files = {number: number if file == -1 else file for number, file in standard}
        files |= {file: file for file in pass_fds}
        request = {
            "arguments": args[len(COMMAND) :],
            "environment": dict(os.environ if env is None else env),
            "directory": str(cwd or Path.cwd()),
            "files": list(files),
            "new_session": start_new_session,
        }
        with self._lock:
            popen.pid = self._fork(request, list(files.values()))
        FORKED_COMMANDS[popen.pid] = args
        popen._child_created = True
        popen._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _fork(self, request: dict[str, Any], files: list[int]) -> int:
        """Fork a child of this process, and return its process id."""
        if self._socket is None:
            self._start()
        assert self._socket is not None
        data = json.dumps(request).encode()
        socket.send_fds(self._socket, [len(data).to_bytes(8, "big")], files)
        # The new process is an orphan at first; the kernel gives it to this process, its subreaper.
        _adopt_orphans(yes=True)
        try:
            self._socket.sendall(data)
            reply = self._socket.recv(8, socket.MSG_WAITALL)
        finally:
            _adopt_orphans(yes=False)
        assert reply, "the fork server has ended"
        return int.from_bytes(reply, "big")

    def _start(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(other.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )


def _adopt_orphans(*, yes: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
