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
    """Run the entry module *name* and exit with its code."""
    main_thread, signals = MainThread(), SignalWatch()
    threading.Thread(
        target=_run_event_loop, args=(name, main_thread, signals), name="event loop", daemon=True
    ).start()
    main_thread.serve()
    threading.Event().wait()  # the thread of the event loop ends the process
    raise AssertionError


def _run_event_loop(name: str, main_thread: MainThread, signals: SignalWatch) -> NoReturn:
    code = 1
    try:
        with telemetry.configure_telemetry(f"fedbus-{name}"):
            try:
                code = asyncio.run(_run(name, main_thread, signals))
            except BaseException as error:
                write_answer(_one_line(error))
                raise
            finally:
                main_thread.end()
    except BaseException:  # noqa: BLE001 - the traceback goes to the log
        traceback.print_exc()
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
