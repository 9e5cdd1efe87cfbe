"""Where a child process of ours begins: ``python -m fedbus.app.child server|trainer|init|check``.

It ends with its parent, logs and traces as the parent does, and is asked to stop by SIGTERM.
What it does then is the agent's own: see `fedbus.agents`.
"""

import asyncio
import importlib
import os
import sys
from typing import NoReturn

from fedbus.agents.child import parent_watch
from fedbus.app import telemetry
from fedbus.app.processes import stopping
from fedbus.app.telemetry.lines import told_once
from fedbus.app.telemetry.process import watched

WORK = {
    "server": "fedbus.agents.server_process",
    "trainer": "fedbus.agents.trainer_process",
    "init": "fedbus.agents.init_process",
    "check": "fedbus.agents.check_process",
}


async def _run(name: str) -> int:
    with stopping() as stop, watched():
        work = importlib.import_module(WORK[name])
        told_once("flwr")
        code: int = await work.main(stop)
        return code


def main() -> NoReturn:
    parent_watch()
    work(sys.argv[1])


def work(name: str) -> NoReturn:
    """Do the work *name*, and end with its exit code."""
    with telemetry.configured(f"fedbus-{name}"):
        code = asyncio.run(_run(name))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is said: taking torch apart object by object takes longer than the goodbye


if __name__ == "__main__":
    main()
