"""Where a child process of ours begins: ``python -m fedbus child server|trainer|init|check``.

It ends with its parent, logs and traces as the parent does, and is asked to stop by SIGTERM.
What it does then is the agent's own: see `fedbus.agents`.
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
"""Letters of an error that are answered."""
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
    """Do the work *name* as a child process."""
    exit_when_parent_dies()
    run_child(name)


def run_child(name: str) -> NoReturn:
    """Do the work *name*, and end with its exit code."""
    with telemetry.configure_telemetry(f"fedbus-{name}"):
        try:
            code = asyncio.run(_run(name))
        except Exception as error:  # where it came from is for the log
            write_answer(_one_line(error))
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is said: taking torch apart object by object takes longer than the goodbye


def _one_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_ERROR_CHARS]}"
