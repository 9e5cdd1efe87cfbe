"""The entry point of a Kubernetes Job: ``python -m fedbus job server``.

The process does the work of a child process (see `fedbus.app.entrypoints.child`), but has no parent and no files of
the Flower server. So it first checks out the task's code from FEDBUS_TASK, at the version of its `ProcessConfig`, and
verifies it. It reads the model from the model repository, by its digest.
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
    """Run the entry module *name* as the process of a Job."""
    run_cli(partial(_run, name))


def _run(name: str) -> None:
    settings = Settings.from_environment()
    config = ProcessConfig.model_validate_json(os.environ[PROCESS_CONFIG_VARIABLE])
    task = asyncio.run(code_from_settings(settings, "").load_task(config.task.code_version))
    os.environ[PROCESS_CONFIG_VARIABLE] = _with_local_task(os.environ[PROCESS_CONFIG_VARIABLE], task)
    child.run_child(name)


def _with_local_task(config: str, task: Task) -> str:
    """Return *config* with the paths of the task in this pod; the task's table stays as the Flower server read it."""
    facts = json.loads(config)
    facts["task"] |= {"path": task.path, "libraries": task.libraries}
    return json.dumps(facts)
