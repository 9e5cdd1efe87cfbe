"""Trying a task's code before it is used, in a process of its own: see `fedbus.agents.common.code_check_process`.

The process is the task's for as long as it takes, `code.check-s` at the most; what it loads, leaks or
breaks ends with it.
"""

import asyncio
from pathlib import Path
from typing import Final

from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess, describe_exit
from fedbus.agents.common.process_orders import CheckProcessConfig, child_command
from fedbus.contracts.code import CodeChecked

_STOP_S: Final = 2.0


class CheckFailed(Exception):
    """The task's code cannot be used here; the text is one line that says why."""


async def check(order: CheckProcessConfig, *, log_file: Path) -> CodeChecked:
    """Import the task's code, build its model, run its own check; raises CheckFailed.

    What the process prints goes to *log_file*, after what stands there already.
    """
    limit_s = order.task.table.code.check_s
    child = ChildProcess(
        "code check",
        *child_command("check"),
        environment=order.environment(),
        output=log_file,
        stop_s=_STOP_S,
    )
    try:
        async with asyncio.timeout(limit_s), child:
            code = await child.ended()
    except TimeoutError:
        raise CheckFailed(f"its check took longer than {limit_s:g} s (code.check-s)") from None
    except ChildNotStarted as error:
        raise CheckFailed(str(error)) from None
    if code != 0:
        raise CheckFailed(child.answer or f"the process that checked it {describe_exit(code)}")
    if not child.answer:
        raise CheckFailed("its check ended the process: without a word")
    return CodeChecked.model_validate_json(child.answer)
