"""`fedbus up` stops in the middle of work, without an error in any log."""

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

ERRORS = re.compile(r"Exception ignored|never retrieved|was destroyed|Traceback|that handles pid")


def slow_task(directory: Path) -> Path:
    """The tiny task with a training that does not end by itself."""
    task = directory / "task"
    shutil.copytree(Path(support.__file__).parent / "tiny_task", task)
    project = task / "pyproject.toml"
    project.write_text(project.read_text().replace("pause-s = 0.0", "pause-s = 1000.0"))
    return task


def has_child(process: ChildProcess, name: str) -> bool:
    """Whether a descendant of *process* runs the entry module *name*."""
    return any(is_agent_child(one, name) for one in descendants_of(process.pid))


@asynccontextmanager
async def run_up(task: Path, home: Path, output: list[str]) -> AsyncIterator[ChildProcess]:
    """Run `fedbus up` with one client until the block ends."""
    command = (sys.executable, "-m", "fedbus.app.cli.main", "up", "--task", str(task), "--clients", "1")
    environment = {"FEDBUS_HOME": str(home)}
    async with ChildProcess(
        "up", *command, "--no-dashboard", environment=environment, output=output.append
    ) as one:
        yield one


async def stop_process(process: ChildProcess) -> int:
    os.kill(process.pid, signal.SIGTERM)
    async with asyncio.timeout(60):
        return await process.wait()


def find_errors(home: Path, output: list[str]) -> list[str]:
    logs = list((home / "logs").glob("*.log"))
    assert logs, "there are no logs"
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line for line in [*lines, *output] if ERRORS.search(line)]


async def test_stop_during_model_initialisation_logs_no_error(tmp_path: Path) -> None:
    home, output = tmp_path / "home", list[str]()
    async with run_up(slow_task(tmp_path), home, output) as process:
        await eventually(lambda: has_child(process, "init"), within_s=60)
        assert await stop_process(process) == 0
    assert find_errors(home, output) == []


@pytest.mark.slow
async def test_stop_during_training_logs_no_error(tmp_path: Path) -> None:
    home, output = tmp_path / "home", list[str]()
    fedbus = FedbusCli(home)
    async with run_up(slow_task(tmp_path), home, output) as process:
        await eventually(lambda: any("1 of 1 clients serve" in line for line in output), within_s=120)
        assert (await fedbus("run", "start")).code == 0
        await eventually(lambda: has_child(process, "trainer"), within_s=120)
        assert await stop_process(process) == 0
    assert find_errors(home, output) == []
