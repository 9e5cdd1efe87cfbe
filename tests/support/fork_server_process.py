"""The process of `fork_server`: it imports the modules of children of agents, and forks one for each request.

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

MODULES = (
    "torch",
    "numpy.random",
    "fedbus.app.entrypoints.kubernetes_job",
    *ENTRY_MODULES.values(),
    "fedbus.learning.flower.client_app_host",
    "fedbus.learning.flower.server_app_host",
    "fedbus.learning.flower.task_code",
    "fedbus.learning.functions.client",
    "fedbus.learning.functions.server",
)
"""What children import. A training library is opened by name, so the entry modules do not import it."""
ABOVE = 512
"""Received files are moved above this number first, so that none has the number of another."""


def main(files: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=files) as requests:
        while True:
            size, received, _, _ = socket.recv_fds(requests, 8, 64)
            if not size:
                return
            data = requests.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            pid = fork_orphan(json.loads(data), received)
            for file in received:
                os.close(file)
            requests.sendall(pid.to_bytes(8, "big"))


def fork_orphan(request: dict[str, Any], received: list[int]) -> int:
    """Fork a process for *request* whose parent has ended, and return its process id."""
    reading, writing = os.pipe()
    if (parent := os.fork()) == 0:
        if (child := os.fork()) == 0:
            run_fedbus(request, received)
        os.write(writing, child.to_bytes(8, "big"))
        os._exit(0)
    os.close(writing)
    pid = int.from_bytes(os.read(reading, 8), "big")
    os.close(reading)
    os.waitpid(parent, 0)
    return pid


def run_fedbus(request: dict[str, Any], received: list[int]) -> None:
    """Run `python -m fedbus` with the arguments, the environment, the files and the directory of *request*."""
    code = 1
    try:
        if request["new_session"]:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        place_files(received, request["files"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        sys.path[0] = request["directory"]
        importlib.import_module("numpy.random").seed()
        sys.argv = ["fedbus", *request["arguments"]]
        runpy.run_module("fedbus", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def place_files(received: list[int], numbers: list[int]) -> None:
    """Give each of the *received* files its number, and close all others."""
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in received]
    os.closerange(3, ABOVE)
    for file, number in zip(above, numbers, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
