"""The engine `ray` on a local cluster of several nodes."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import BadTask
from fedbus.simulation.engine import EngineFailed
from fedbus.simulation.observer import SilentObserver, SimulationProgress
from fedbus.simulation.settings import SimulationResult, SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

CLIENTS = 40

PYPROJECT = """
[project]
name = "counted"

[tool.fedbus]
library = "functions"
functions = "counted_app.functions"
"""

FUNCTIONS = """
import os, socket, time

import numpy as np

def load(partition_id):
    return partition_id

def initial(config):
    return {"w": np.zeros(200_000, np.float32)}

def train(weights, data, config, state):
    time.sleep(SECONDS)
    state["calls"] = state.get("calls", np.zeros(1)) + 1
    weights["w"] += np.random.normal(size=1).astype(np.float32) + data
    open(os.path.join(os.path.dirname(__file__), f"{os.getpid()}.pid"), "w").close()
    return weights, {"train_loss": float(state["calls"][0])}, 10 + data

def evaluate(weights, data, config):
    return {"eval_loss": float(weights["w"][0])}, 1
"""


class InterruptingObserver(SilentObserver):
    """Records warnings, and calls *interrupt* once, when five clients have trained in round 2."""

    def __init__(self, interrupt: Any = None) -> None:
        self.warnings: list[str] = []
        self._interrupt = interrupt

    def on_progress(self, progress: SimulationProgress) -> None:
        if self._interrupt and (progress.round, progress.kind) == (2, "train") and progress.done >= 5:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


def make_task(directory: Path, *, seconds: float = 0.0, functions: str = FUNCTIONS) -> Task:
    app = directory / "task" / "counted_app"
    app.mkdir(parents=True)
    (app / "__init__.py").touch()
    (app / "functions.py").write_text(functions.replace("SECONDS", str(seconds)))
    (app.parent / "pyproject.toml").write_text(PYPROJECT)
    return read_task(app.parent, open_library)


def run(task: Task, observer: InterruptingObserver | None = None, **settings: Any) -> SimulationResult:
    default: dict[str, Any] = {"clients": CLIENTS, "rounds": 3, "seed": 5, "engine": "ray"}
    return simulate(SimulationSettings(task=task, **(default | settings)), observer)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster with one node of two cores, to which a test may add another."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_gives_the_bits_of_the_local_engine(cluster: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path)
    results = [
        run(task, deterministic=True, **settings)
        for settings in ({"engine": "local", "workers": 2}, {"ray_address": cluster.address})
    ]
    for one, other in zip(results[0].rounds, results[1].rounds, strict=True):
        assert one.metrics.keys() == other.metrics.keys()
        assert one.metrics["eval_loss"] == other.metrics["eval_loss"]
        assert one.participants == other.participants
    np.testing.assert_array_equal(results[0].model["w"], results[1].model["w"])
    assert results[1].rounds[-1].metrics["train_loss"] == 3, "clients keep their state"
    assert not ray.is_initialized()


def test_the_run_goes_on_when_a_node_dies_in_a_round(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2)
    observer = InterruptingObserver(lambda: cluster.remove_node(node, allow_graceful=False))
    result = run(make_task(tmp_path, seconds=0.05), observer, ray_address=cluster.address)
    assert [one.round for one in result.rounds if one.round] == [1, 2, 3]
    for one in result.rounds:
        if one.round:
            assert len(one.participants) + len(one.failures) == CLIENTS
    assert len(result.rounds[-1].participants) == CLIENTS
    assert result.lost_workers == 2
    assert all(
        "its machine left the cluster" in text or "is unavailable" in text for text in observer.warnings
    )
    assert len(observer.warnings) == 2


def test_a_killed_worker_is_replaced(cluster: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path, seconds=0.05)
    killed: list[int] = []

    def kill_a_worker() -> None:
        killed.append(min(int(file.stem) for file in Path(task.path).rglob("*.pid")))
        os.kill(killed[0], signal.SIGKILL)

    observer = InterruptingObserver(kill_a_worker)
    result = run(task, observer, ray_address=cluster.address)
    assert result.lost_workers == 1
    assert len(result.rounds[-1].participants) == CLIENTS
    (warning,) = observer.warnings
    assert warning.startswith("worker ")
    assert f"(process {killed[0]} on {socket.gethostname()}) has ended" in warning


def test_more_workers_than_cores_are_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="9 workers need a core each, and the Ray cluster has 2"):
        run(make_task(tmp_path), workers=9, ray_address=cluster.address)


def test_an_app_that_cannot_be_imported_ends_the_start(cluster: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path)
    (Path(task.path) / "counted_app/functions.py").write_text("import no_such_package\n" + FUNCTIONS)
    with pytest.raises(BadTask, match="no_such_package"):
        run(task, ray_address=cluster.address)


def test_a_message_that_takes_too_long_fails_alone(cluster: Any, tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("time.sleep(SECONDS)", "time.sleep(60 if data == 7 else 0)")
    result = run(
        make_task(tmp_path, functions=functions),
        InterruptingObserver(),
        rounds=1,
        round_s=3.0,
        ray_address=cluster.address,
    )
    assert list(result.rounds[-1].failures) == ["client-0007"]
    assert "no reply within 3 s" in result.rounds[-1].failures["client-0007"]


def test_without_an_address_a_cluster_is_started(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    result = run(make_task(tmp_path), workers=1, clients=3, rounds=1)
    assert len(result.rounds[-1].participants) == 3
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_absent_cluster_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"cannot connect to the Ray cluster 127\.0\.0\.1:1: "):
        run(make_task(tmp_path), ray_address="127.0.0.1:1")
