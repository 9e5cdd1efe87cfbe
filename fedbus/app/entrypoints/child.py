"""Where a child process of ours begins: ``python -m fedbus child server|trainer|init|check``.

It ends with its parent, logs and traces as the parent does, and is asked to stop by SIGTERM.
What it does then is the agent's own: see `fedbus.agents`.
"""

import asyncio
import importlib
import os
import sys
from typing import NoReturn

from fedbus.agents.common.child_process import answer, parent_watch
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import stopping
from fedbus.app.telemetry.log_lines import use_root_handlers
from fedbus.app.telemetry.process_metrics import measure_process

MOST_SAID = 500
"""Letters of an error that are answered."""
WORK = {
    "server": "fedbus.agents.flower_server.server_app_process",
    "trainer": "fedbus.agents.flower_client.client_app_process",
    "init": "fedbus.agents.flower_server.model_init_process",
    "check": "fedbus.agents.common.code_check_process",
}


async def _run(name: str) -> int:
    with stopping() as stop, measure_process():
        work = importlib.import_module(WORK[name])
        use_root_handlers("flwr")
        code: int = await work.main(stop)
        return code


def main(name: str) -> NoReturn:
    """Do the work *name* as a child process."""
    parent_watch()
    work(name)


def work(name: str) -> NoReturn:
    """Do the work *name*, and end with its exit code."""
    with telemetry.configured(f"fedbus-{name}"):
        try:
            code = asyncio.run(_run(name))
        except Exception as error:  # where it came from is for the log
            answer(_in_a_line(error))
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is said: taking torch apart object by object takes longer than the goodbye


def _in_a_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_SAID]}"
