"""The virtual time of a simulated run is the one that a computation by hand gives."""

from pathlib import Path

import pytest

from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.reader import load_profile
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.settings import SimulationResult, SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

PYPROJECT = """
[project]
name = "timed"

[tool.fedbus]
library = "functions"
functions = "timed_app.functions"
"""

FUNCTIONS = """
import numpy as np

def load(partition_id):
    return partition_id

def initial(config):
    return {"w": np.zeros(SIZE, np.float32)}

def train(weights, data, config):
    weights["w"] += 1
    return weights, {}, 10

def evaluate(weights, data, config):
    return {"eval_loss": float(weights["w"][0])}, 1
"""


def run(directory: Path, profile: Profile, *, rounds: int = 2, size: int = 2) -> SimulationResult:
    (directory / "timed_app").mkdir()
    (directory / "timed_app" / "__init__.py").touch()
    (directory / "timed_app" / "functions.py").write_text(FUNCTIONS.replace("SIZE", str(size)))
    (directory / "pyproject.toml").write_text(PYPROJECT)
    task = read_task(directory, open_library)
    settings = SimulationSettings(task=task, clients=3, rounds=rounds, profile=profile, workers=2, seed=3)
    return simulate(settings)


def test_a_round_takes_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    profile = Profile.model_validate(
        {
            "groups": {
                "slow": {
                    "clients": ["client-0001"],
                    "training": {"seconds": 5},
                    "delay": 4,
                    "latency": 0.5,
                },
                "fast": {"training": {"seconds": 2}},
            }
        }
    )
    result = run(tmp_path, profile)
    train_s = 0.5 + 5 + 4 + 0.5
    evaluate_s = 0.5 + 0.5
    assert result.simulated_s == pytest.approx(2 * (train_s + evaluate_s))
    assert result.rounds[-1].train_s == {"client-0000": 2.0, "client-0001": 5.0, "client-0002": 2.0}
    assert result.seconds < 20


@pytest.mark.slow
def test_time_by_samples(tmp_path: Path) -> None:
    profile = Profile.model_validate({"groups": {"all": {"training": {"seconds-per-sample": 0.3}}}})
    result = run(tmp_path, profile)
    assert result.simulated_s == pytest.approx(2 * 10 * 0.3)


def test_transfers_take_the_bytes_over_the_bandwidth(tmp_path: Path) -> None:
    profile = Profile.model_validate({"groups": {"all": {"training": {"seconds": 2}, "bandwidth": 8}}})
    result = run(tmp_path, profile, size=250_000)  # 1 MB, which takes 1 s
    assert result.simulated_s == pytest.approx(2 * (1 + 2 + 1 + 1), rel=0.01)


@pytest.mark.slow
def test_delays_are_those_of_the_seed(tmp_path: Path) -> None:
    profile = load_profile("delay-study", {"probability": 0.6}).model_copy()
    group = profile.groups["delayed"].model_copy(
        update={"training": profile.groups["delayed"].training.model_validate({"seconds": 1})}
    )
    profile = profile.model_copy(update={"groups": {"delayed": group}})
    result = run(tmp_path, profile, rounds=5)
    clients = [f"client-{number:04}" for number in range(3)]
    conditions = Conditions(profile, clients, seed=3)
    # each client gets two messages in a round: the first one trains, the second one evaluates
    rounds = [
        max(1 + conditions.device(client).delay_s(2 * number) for client in clients) for number in range(5)
    ]
    assert {1.0, 4.0} >= set(rounds)
    assert result.simulated_s == pytest.approx(sum(rounds))
