"""Runs a program that must not outlive us and does not know it: ``python -I -S tether.py PARENT PROGRAM …``.

On Linux this process becomes the program, after telling the kernel to kill it when the
parent dies (``PR_SET_PDEATHSIG``). Done here, between two programs, and not in a
``preexec_fn``: Python code between fork and exec can deadlock where the parent has threads.

Elsewhere it stays as the program's guard: standard input is the life line to the parent, and
when that closes, or somebody asks this process to stop, the program goes first.

Nothing of fedbus is imported: it runs in 20 ms, and in any Python.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Thread

PR_SET_PDEATHSIG = 1
STAY = "--stay"


def wrapper_command(*, stay: bool = False) -> tuple[str, ...]:
    """What to put before the command of a program that must not outlive this process."""
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
    import ctypes  # noqa: PLC0415  # 10 ms that the other way does not need

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the kernel knew
        sys.exit("the parent has gone")
    os.execv(command[0], command)  # noqa: S606  # a shell would be one process too many


def _run_as_guard(command: list[str]) -> int:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as program:
        signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        Thread(target=_kill_on_eof, args=(program,), daemon=True).start()
        return program.wait()


def _kill_on_eof(program: "subprocess.Popen[bytes]") -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    program.kill()


if __name__ == "__main__":
    main()
