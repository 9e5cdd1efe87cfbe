"""The process that `fork_server` starts: it imports what children of agents need, and forks one for each order.

Usage: python fork_server_process.py SOCKET
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from typing import Any

from fedbus.app.entrypoints.child import ENTRY_MODULES

ABOVE = 512
"""The received files are kept above this number, so that none is in the place of another."""


def main(files: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("torch", "numpy.random", "fedbus.app.entrypoints.kubernetes_job", *ENTRY_MODULES.values()):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=files) as orders:
        while True:
            size, received, _, _ = socket.recv_fds(orders, 8, 64)
            if not size:
                return
            data = orders.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            pid = orphan(json.loads(data), received)
            for file in received:
                os.close(file)
            orders.sendall(pid.to_bytes(8, "big"))


def orphan(order: dict[str, Any], received: list[int]) -> int:
    """The number of a new process that does *order*, and whose parent has ended."""
    reading, writing = os.pipe()
    if (parent := os.fork()) == 0:
        if (child := os.fork()) == 0:
            become(order, received)
        os.write(writing, child.to_bytes(8, "big"))
        os._exit(0)
    os.close(writing)
    pid = int.from_bytes(os.read(reading, 8), "big")
    os.close(reading)
    os.waitpid(parent, 0)
    return pid


def become(order: dict[str, Any], received: list[int]) -> None:
    """Be `python -m fedbus` with the arguments, the environment, the files and the directory of *order*."""
    code = 1
    try:
        if order["new_session"]:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        take(received, order["files"])
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["directory"])
        sys.path[0] = order["directory"]
        importlib.import_module("numpy.random").seed()
        sys.argv = ["fedbus", *order["arguments"]]
        runpy.run_module("fedbus", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # as the interpreter does it
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def take(received: list[int], places: list[int]) -> None:
    """Put each of the *received* files in its place, and close all others."""
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in received]
    os.closerange(3, ABOVE)
    for file, place in zip(above, places, strict=True):
        os.dup2(file, place, inheritable=True)
        os.close(file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
