"""Check a task's code in a process of its own before it is used; see `fedbus.agents.common.code_check_process`.

The check takes at most `code.check-s`. Whatever the code loads, leaks or breaks ends with the process.
"""

import asyncio
from pathlib import Path
from typing import Final

from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess, describe_exit
from fedbus.agents.common.process_orders import CheckProcessConfig, child_command
from fedbus.contracts.code import CodeChecked

_STOP_S: Final = 2.0


class CheckFailed(Exception):
    """The task's code cannot be used on this machine; the text is the reason, on one line."""


async def check(config: CheckProcessConfig, *, log_file: Path) -> CodeChecked:
    """Import the task's code, build its model, and run its own check. The output is appended to *log_file*.

    Raises:
        CheckFailed: The code cannot be used.

    """
    limit_s = config.task.table.code.check_s
    child = ChildProcess(
        "code check",
        *child_command("check"),
        environment=config.environment(),
        output=log_file,
        stop_s=_STOP_S,
    )
    try:
        async with asyncio.timeout(limit_s), child:
            code = await child.wait()
    except TimeoutError:
        raise CheckFailed(f"the check did not end in time (limit code.check-s = {limit_s:g} s)") from None
    except ChildNotStarted as error:
        raise CheckFailed(str(error)) from None
    if code != 0:
        raise CheckFailed(child.answer or f"the check process {describe_exit(code)}")
    if not child.answer:
        raise CheckFailed("the check ended its process without a result")
    return CodeChecked.model_validate_json(child.answer)
