"""Where the process of a Kubernetes Job begins: ``python -m fedbus job server``.

It does what a child process does (see `fedbus.app.entrypoints.child`), without a parent: nobody holds its
life line, and nothing of the wrapper's disk is here. So it first gets the task's code at the version of its
order, from where FEDBUS_TASK says, verified like everywhere; the model comes out of the repository by its digest.
"""

import asyncio
import json
import os
from functools import partial
from typing import NoReturn

from fedbus.agents.common.process_orders import PROCESS_CONFIG_VARIABLE, ProcessConfig
from fedbus.app.composition.initial_code import code_from_settings
from fedbus.app.entrypoints import child
from fedbus.app.failures import run_cli
from fedbus.app.settings import Settings
from fedbus.contracts.task.task import Task


def main(name: str) -> NoReturn:
    """Do the work *name* as the process of a Job."""
    run_cli(partial(_run, name))


def _run(name: str) -> None:
    settings = Settings.from_environment()
    order = ProcessConfig.model_validate_json(os.environ[PROCESS_CONFIG_VARIABLE])
    task = asyncio.run(code_from_settings(settings, "").task_at(order.task.code_version))
    os.environ[PROCESS_CONFIG_VARIABLE] = _with_local_task(os.environ[PROCESS_CONFIG_VARIABLE], task)
    child.run_child(name)


def _with_local_task(order: str, task: Task) -> str:
    """*order* with the task where it lies in this pod; how it is to be run stays as the wrapper read it."""
    told = json.loads(order)
    told["task"] |= {"path": task.path, "libraries": task.libraries}
    return json.dumps(told)
