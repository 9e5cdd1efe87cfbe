"""The task of the simulated fleets: no process imports its code."""

from pathlib import Path

import pytest

from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task

TINY_TASK = Path(__file__).parents[2] / "support" / "tiny_task"


@pytest.fixture(scope="session")
def task() -> Task:
    return read_task(TINY_TASK, open_library, version="1" * 40)
