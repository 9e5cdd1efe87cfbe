"""`fedbus up`, asked to stop in the middle of something: it ends, and no log has a word of complaint."""

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import support
from support import eventually
from support.cli import FedbusCli
from support.processes import descendants_of, is_agent_child

from fedbus.agents.common.child_process import ChildProcess

COMPLAINTS = re.compile(r"Exception ignored|never retrieved|was destroyed|Traceback|that handles pid")


def slow_task(directory: Path) -> Path:
    """The tiny task, whose training goes on until somebody ends it."""
    task = directory / "task"
    shutil.copytree(Path(support.__file__).parent / "tiny_task", task)
    project = task / "pyproject.toml"
    project.write_text(project.read_text().replace("pause-s = 0.0", "pause-s = 1000.0"))
    return task


def has_child(process: ChildProcess, work: str) -> bool:
    """Whether one of the processes below *process* does *work*."""
    return any(is_agent_child(one, work) for one in descendants_of(process.pid))


@asynccontextmanager
async def run_up(task: Path, home: Path, said: list[str]) -> AsyncIterator[ChildProcess]:
    """`fedbus up` with one client, for as long as the block runs."""
    command = (sys.executable, "-m", "fedbus.app.cli.main", "up", "--task", str(task), "--clients", "1")
    environment = {"FEDBUS_HOME": str(home)}
    async with ChildProcess(
        "up", *command, "--no-dashboard", environment=environment, output=said.append
    ) as one:
        yield one


async def stop_process(process: ChildProcess) -> int:
    os.kill(process.pid, signal.SIGTERM)
    async with asyncio.timeout(60):
        return await process.wait()


def find_complaints(home: Path, said: list[str]) -> list[str]:
    logs = list((home / "logs").glob("*.log"))
    assert logs, "nothing was written that could complain"
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line for line in [*lines, *said] if COMPLAINTS.search(line)]


async def test_stop_during_model_initialisation_logs_no_error(tmp_path: Path) -> None:
    home, said = tmp_path / "home", list[str]()
    async with run_up(slow_task(tmp_path), home, said) as process:
        await eventually(lambda: has_child(process, "init"), within_s=60)
        assert await stop_process(process) == 0
    assert find_complaints(home, said) == []


@pytest.mark.slow
async def test_stop_during_training_logs_no_error(tmp_path: Path) -> None:
    home, said = tmp_path / "home", list[str]()
    fedbus = FedbusCli(home)
    async with run_up(slow_task(tmp_path), home, said) as process:
        await eventually(lambda: any("1 of 1 clients serve" in line for line in said), within_s=120)
        assert (await fedbus("run", "start")).code == 0
        await eventually(lambda: has_child(process, "trainer"), within_s=120)
        assert await stop_process(process) == 0
    assert find_complaints(home, said) == []
