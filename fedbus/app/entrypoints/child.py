"""The entry point of child processes of agents: ``python -m fedbus child server|trainer|init|check``.

A child process ends when its parent dies, logs and traces as the parent does, and stops on SIGTERM.
`ENTRY_MODULES` has the module of each. The code of a task runs in the main thread, and the event loop in another one,
which ends the process even while the code of the task blocks.
"""

import asyncio
import importlib
import os
import sys
import threading
import traceback
from concurrent.futures import Future
from typing import NoReturn

from fedbus.agents.common.child_process import exit_when_parent_dies, write_answer
from fedbus.agents.common.main_thread import MainThread
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import SignalWatch
from fedbus.app.telemetry.process_metrics import measure_process

MAX_ERROR_CHARS = 500
"""Length limit of the error in an answer, in characters."""
ENTRY_MODULES = {
    "server": "fedbus.agents.flower_server.server_app_process",
    "trainer": "fedbus.agents.flower_client.client_app_process",
    "init": "fedbus.agents.flower_server.model_init_process",
    "check": "fedbus.agents.common.code_check_process",
}


def main(name: str) -> NoReturn:
    """Run the entry module *name* as a child process."""
    exit_when_parent_dies()
    run_child(name)


def run_child(name: str) -> NoReturn:
    """Run the entry module *name* and exit with its code. Raises its error, unless the code of the task blocks."""
    main_thread, signals, exit_code = MainThread(), SignalWatch(), Future[int]()
    threading.Thread(
        target=_run_event_loop, args=(name, main_thread, signals, exit_code), name="event loop", daemon=True
    ).start()
    main_thread.serve()
    _exit(exit_code.result())


def _run_event_loop(
    name: str, main_thread: MainThread, signals: SignalWatch, exit_code: "Future[int]"
) -> None:
    """Run the event loop. End the process here only if the main thread is blocked in the code of the task."""
    with telemetry.configure_telemetry(f"fedbus-{name}"):
        try:
            exit_code.set_result(asyncio.run(_run(name, main_thread, signals)))
        except BaseException as error:  # noqa: BLE001 - the main thread raises it; the traceback goes to the log
            write_answer(_one_line(error))
            exit_code.set_exception(error)
        is_free = main_thread.end()
    if is_free:
        main_thread.release()
    elif failure := exit_code.exception():
        traceback.print_exception(failure)
        _exit(1)
    else:
        _exit(exit_code.result())


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is flushed; the destructors of torch take seconds


async def _run(name: str, main_thread: MainThread, signals: SignalWatch) -> int:
    with signals.stop_event() as stop, measure_process():
        work = importlib.import_module(ENTRY_MODULES[name])
        code: int = await work.main(stop, main_thread)
        return code


def _one_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_ERROR_CHARS]}"
