"""Runs a program that must end when its parent dies: ``python -I -S orphan_guard.py PARENT PROGRAM …``.

On Linux this process sets ``PR_SET_PDEATHSIG``, so that the kernel kills it when the parent dies, and then
executes the program. This is done here and not in a ``preexec_fn``: Python code between fork and exec can
deadlock if the parent has threads.

On other systems, or with ``--stay``, this process stays and runs the program as its child. Standard input is a pipe
from the parent. When the pipe closes, this process kills the program; on SIGTERM it terminates the program.

This file imports nothing of fedbus, so it starts in 20 ms.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Event, Thread

PR_SET_PDEATHSIG = 1
STAY = "--stay"


def wrapper_command(*, stay: bool = False) -> tuple[str, ...]:
    """Return the prefix for the command of a program that must end with this process."""
    return (sys.executable, "-I", "-S", __file__, *([STAY] if stay else []), str(os.getpid()))


def main() -> None:
    arguments = sys.argv[1:]
    stay = arguments[0] == STAY
    parent, *command = arguments[1:] if stay else arguments
    if sys.platform == "linux" and not stay:
        _exec_program(command, int(parent))
    else:
        sys.exit(_run_as_guard(command))


def _exec_program(command: list[str], parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before prctl
        sys.exit("parent process has ended")
    os.execv(command[0], command)  # noqa: S606  # a shell would be one process too many


def _run_as_guard(command: list[str]) -> int:
    stopped = Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # it may arrive before Popen returns
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as program:
        signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        if stopped.is_set():
            program.terminate()
        Thread(target=_kill_on_eof, args=(program,), daemon=True).start()
        return program.wait()


def _kill_on_eof(program: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    program.kill()


if __name__ == "__main__":
    main()
