"""The process that tries a task's code before it is used: ``python -m fedbus child check``.

Imports what the task refers to, builds its model, and runs the task's own check, if it has one. Its answer
is `CodeChecked` as JSON, or, with exit code 1, what is wrong.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedbus.agents.common.child_process import exit_with_reason, write_answer
from fedbus.agents.common.process_orders import CheckProcessConfig, read_process_config
from fedbus.contracts.code import CodeChecked
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.flower import task_code


async def main(_: asyncio.Event) -> int:
    order = read_process_config(CheckProcessConfig)
    try:
        checked = await asyncio.to_thread(_check, order)
    except (task_code.BadTask, weights.BadWeights) as error:
        return exit_with_reason(str(error))
    write_answer(checked.model_dump_json())
    return 0


def _check(order: CheckProcessConfig) -> CodeChecked:
    path, table = Path(order.task.path), order.task.table
    task_code.load_client_app(path, order.task.clientapp)
    if order.server_side:
        task_code.load_server_app(path, order.task.serverapp)
    for reference in (table.predict, table.samples):
        if reference is not None:
            task_code.load_function(path, reference)
    arrays = _build_model(order.task)
    if table.code.check is not None:
        _call_task_code(task_code.load_function(path, table.code.check), f"its check {table.code.check} says")
    differs = weights.first_difference(weights.load(Path(order.like)), arrays) if order.like else None
    return CodeChecked(architecture=weights.architecture_digest(arrays), differs=differs or "")


def _build_model(task: Task) -> weights.Arrays:
    """The model that the task builds, as arrays; raises BadTask and BadWeights."""
    builder = task_code.load_function(Path(task.path), task.table.model)
    state: dict[str, Any] = _call_task_code(
        lambda: builder().state_dict(), f"{task.table.model} did not make a model"
    )
    return weights.from_torch(state)


def _call_task_code(what: Callable[[], Any], otherwise: str) -> Any:
    """Call what the task has; raises BadTask, also where it wants to end the process."""
    try:
        return what()
    except (Exception, SystemExit) as error:
        raise task_code.BadTask(f"{otherwise}: {task_code.format_error(error)}") from error
