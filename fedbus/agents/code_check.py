"""Trying a task's code before it is used, in a process of its own: see `fedbus.agents.check_process`.

The process is the task's for as long as it takes, `code.check-s` at the most; what it loads, leaks or
breaks ends with it.
"""

import asyncio
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedbus.agents.child import ChildNotStarted, ChildProcess, how_it_ended, last_words
from fedbus.agents.launch import CheckOrder, child_command
from fedbus.contracts.code import CodeChecked

_STOP_S: Final = 2.0


class CheckFailed(Exception):
    """The task's code cannot be used here; the text is one line that says why."""


async def check(order: CheckOrder, *, log_file: Path) -> CodeChecked:
    """Import the task's code, build its model, run its own check; raises CheckFailed.

    The process says what it does in *log_file*, after what stands there already.
    """
    said_before = _size(log_file)
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
    last = await asyncio.to_thread(_last_line, log_file, said_before)
    if code != 0:
        raise CheckFailed(last or f"the process that checked it {how_it_ended(code)}")
    try:
        return CodeChecked.model_validate_json(last)
    except ValidationError:
        raise CheckFailed(f"its check ended the process: {last or 'without a word'}") from None


def _size(log_file: Path) -> int:
    return log_file.stat().st_size if log_file.exists() else 0


def _last_line(log_file: Path, after: int) -> str:
    """The last line that stands in *log_file* beyond *after*: what an earlier check said is not this one's."""
    return last_words(log_file, 1) if _size(log_file) > after else ""
