"""The process that checks a task's code before it is used: ``python -m fedbus child check``.

It imports what the task refers to, builds its model, and runs the task's own check, if there is one. Its answer is
`CodeChecked` as JSON, or the reason of the failure with exit code 1.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedbus.agents.common.child_process import exit_with_reason, write_answer
from fedbus.agents.common.main_thread import MainThread
from fedbus.agents.common.process_orders import CheckProcessConfig, read_process_config
from fedbus.contracts.code import CodeChecked
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning import task_code, weights
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.task_model import first_arrays


async def main(_: asyncio.Event, main_thread: MainThread) -> int:
    config = read_process_config(CheckProcessConfig)
    try:
        checked = await main_thread.run(_check, config)
    except (task_code.BadTask, LibraryUnusable, weights.BadWeights) as error:
        return exit_with_reason(str(error))
    write_answer(checked.model_dump_json())
    return 0


def _check(config: CheckProcessConfig) -> CodeChecked:
    path, table = Path(config.task.path), config.task.table
    open_library(table.library).check(config.task, server_side=config.server_side)
    for reference in (config.task.predict, table.samples):
        if reference is not None:
            task_code.load_function(path, reference)
    arrays = first_arrays(config.task)
    if table.code.check is not None:
        _call_task_code(task_code.load_function(path, table.code.check), f"{table.code.check} failed")
    fixed = table.architecture == "fixed"
    if arrays is None:
        return CodeChecked(architecture="", fixed=fixed)
    difference = weights.first_difference(weights.load(Path(config.like)), arrays) if config.like else None
    return CodeChecked(
        architecture=weights.architecture_digest(arrays), differs=difference or "", fixed=fixed
    )


def _call_task_code(function: Callable[[], Any], failure: str) -> Any:
    """Call a function of the task; any exception, also SystemExit, is raised as BadTask with the text *failure*."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise task_code.BadTask(f"{failure}: {task_code.format_error(error)}") from error
