"""The time limit of a message in simulation."""

from pathlib import Path

from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

PYPROJECT = """
[project]
name = "slow-import"

[tool.fedbus]
library = "functions"
functions = "slow_app.functions"
"""

FUNCTIONS = """
import os, time

import numpy as np

if os.environ.get("OMP_NUM_THREADS") == "1":  # in the process that the workers are forked from
    time.sleep(1.5)

def load(partition_id):
    return partition_id

def initial(config):
    return {"w": np.zeros(1)}

def train(weights, data, config):
    time.sleep(20 if data == 2 else 0)
    return weights, {"train_loss": 0.5}, 10

def evaluate(weights, data, config):
    return {"eval_loss": 1.0}, 1
"""


def test_the_limit_begins_when_the_app_is_imported(tmp_path: Path) -> None:
    (tmp_path / "slow_app").mkdir()
    (tmp_path / "slow_app/__init__.py").touch()
    (tmp_path / "slow_app/functions.py").write_text(FUNCTIONS)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    task = read_task(tmp_path, open_library)
    result = simulate(SimulationSettings(task=task, clients=4, rounds=1, workers=1, round_s=1.0))
    (round_one,) = [one for one in result.rounds if one.round == 1]
    assert list(round_one.failures) == ["client-0002"]
    assert "no reply within 1 s" in round_one.failures["client-0002"]
    assert len(round_one.participants) == 3
