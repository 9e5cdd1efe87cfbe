"""A federation trains and serves on machines that have neither Flower nor torch.

The processes have an import system that refuses both, and the processes that they start inherit it.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support import eventually
from support.blocked_packages import environment_without

from fedbus.agents.common.child_process import ChildProcess

BLOCKED = ("flwr", "torch", "sklearn")


class Machine:
    """A machine without these libraries."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = environment_without(directory, *BLOCKED)
        self.output: list[str] = []

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )

    def fedbus(self, *arguments: str) -> str:
        result = self.python("-m", "fedbus", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    async def fedbus_json(self, *arguments: str) -> Any:
        return json.loads(await asyncio.to_thread(self.fedbus, *arguments, "--json"))

    @asynccontextmanager
    async def up(self, task: str) -> AsyncIterator[None]:
        """Run `fedbus up` with two clients until the block ends."""
        command = (
            sys.executable,
            "-m",
            "fedbus",
            "up",
            "--task",
            str(self.directory / task),
            "--clients",
            "2",
            "--no-dashboard",
        )
        own = {key: self.environment[key] for key in ("PYTHONPATH", "FEDBUS_HOME")}
        async with ChildProcess("up", *command, environment=own, output=self.output.append):
            await eventually(lambda: any("2 of 2 clients serve" in line for line in self.output), within_s=90)
            yield


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("library", BLOCKED)
def test_the_machine_has_none_of_the_libraries(machine: Machine, library: str) -> None:
    result = machine.python("-c", f"import {library}")
    assert f"ModuleNotFoundError: No module named '{library}'" in result.stderr


def test_a_flower_task_is_refused_there_with_the_reason(machine: Machine) -> None:
    machine.fedbus("task", "new", "moons")
    result = machine.python("-c", CHECK, "moons")
    assert "No module named 'flwr'" in result.stderr


CHECK = """
import sys
from pathlib import Path
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task
task = read_task(Path(sys.argv[1]), open_library)
open_library(task.table.library).check(task, server_side=True)
"""


async def test_a_new_task_trains_and_serves_there(machine: Machine) -> None:
    machine.fedbus("task", "new", "circle", "--library", "functions")
    machine.fedbus("task", "validate", "circle")
    assert machine.python("-c", CHECK, "circle").stderr == ""
    async with machine.up("circle"):
        await eventually(lambda: _has_model(machine, 2), within_s=90)
        run = await machine.fedbus_json("run", "show", "circle-1")
        assert (run["state"], run["rounds_done"]) == ("finished", 3), run
        assert run["accuracy"] > 0.8
        clients = await machine.fedbus_json("clients", "ls")
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{clients[0]['endpoint']}/predict", json={"inputs": [[0, 0], [0.95, 0.95]]}
            ) as answer,
        ):
            body = await answer.json()
    assert body["outputs"] == [1, 0], body


async def _has_model(machine: Machine, version: int) -> bool:
    clients = await machine.fedbus_json("clients", "ls")
    return len(clients) == 2 and all(client["model_version"] == version for client in clients)
