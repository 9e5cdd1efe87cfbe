"""The entry point of child processes of agents: ``python -m fedbus child server|trainer|init|check``.

A child process ends when its parent dies, logs and traces as the parent does, and stops on SIGTERM.
`ENTRY_MODULES` has the module of each.
"""

import asyncio
import importlib
import os
import sys
from typing import NoReturn

from fedbus.agents.common.child_process import exit_when_parent_dies, write_answer
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import stop_on_signals
from fedbus.app.telemetry.log_lines import use_root_handlers
from fedbus.app.telemetry.process_metrics import measure_process

MAX_ERROR_CHARS = 500
"""Length limit of the error in an answer, in characters."""
ENTRY_MODULES = {
    "server": "fedbus.agents.flower_server.server_app_process",
    "trainer": "fedbus.agents.flower_client.client_app_process",
    "init": "fedbus.agents.flower_server.model_init_process",
    "check": "fedbus.agents.common.code_check_process",
}


async def _run(name: str) -> int:
    with stop_on_signals() as stop, measure_process():
        work = importlib.import_module(ENTRY_MODULES[name])
        use_root_handlers("flwr")
        code: int = await work.main(stop)
        return code


def main(name: str) -> NoReturn:
    """Run the entry module *name* as a child process."""
    exit_when_parent_dies()
    run_child(name)


def run_child(name: str) -> NoReturn:
    """Run the entry module *name* and exit with its code."""
    with telemetry.configure_telemetry(f"fedbus-{name}"):
        try:
            code = asyncio.run(_run(name))
        except Exception as error:  # the traceback goes to the log
            write_answer(_one_line(error))
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is flushed; the destructors of torch take seconds


def _one_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_ERROR_CHARS]}"
