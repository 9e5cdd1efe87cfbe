"""The preparation of a worker: the import of the app, and what torch imports later."""

import subprocess
import sys
from pathlib import Path

from simulation.tiny_tasks import write_task

MAKES_AN_OPTIMIZER = """
import sys
from pathlib import Path

import torch
from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.worker_setup import import_app
from fedbus.stores.tasks.task_directory import read_task

assert import_app(read_task(Path(sys.argv[1]), open_library)) == ""
before = set(sys.modules)
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
print(sorted(set(sys.modules) - before))
"""


def test_a_worker_imports_nothing_for_its_first_optimizer(tmp_path: Path) -> None:
    task = write_task(tmp_path, "functions")
    command = [sys.executable, "-c", MAKES_AN_OPTIMIZER, str(task.path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "[]"
