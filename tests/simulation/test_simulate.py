"""Whole simulations with worker processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from simulation.tiny_tasks import mean_step, write_task
from support.processes import command_of, descendants_of

from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.task import Task
from fedbus.learning.library import BadTask
from fedbus.learning.weights import Arrays
from fedbus.simulation.observer import SilentObserver, SimulationProgress, SimulationStart
from fedbus.simulation.settings import BadSettings, SimulationSettings
from fedbus.simulation.simulator import simulate


@dataclass
class Recorder(SilentObserver):
    start: SimulationStart | None = None
    progress: list[SimulationProgress] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def on_start(self, start: SimulationStart) -> None:
        self.start = start

    def on_progress(self, progress: SimulationProgress) -> None:
        self.progress.append(progress)

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    left = [one for one in descendants_of(os.getpid()) if "simulation.local" in str(command_of(one))]
    assert left == []


@pytest.fixture
def functions(tmp_path: Path) -> Task:
    return write_task(tmp_path / "functions", "functions")


def settings(task: Task, **changes: Any) -> SimulationSettings:
    return SimulationSettings(**{"task": task, "clients": 6, "workers": 2, "rounds": 2, **changes})


@pytest.mark.parametrize("library", ["flower", "functions"])
def test_a_run_of_any_library_trains_evaluates_and_keeps_state(tmp_path: Path, library: str) -> None:
    recorder = Recorder()
    result = simulate(settings(write_task(tmp_path, library)), recorder)

    step = mean_step(*range(6))
    np.testing.assert_allclose(result.model["w"], 2 * step, rtol=1e-6)
    first, second = [one for one in result.rounds if one.round]
    assert first.participants == {f"client-{number:04}": number + 1 for number in range(6)}
    assert first.metrics["eval_loss"] == pytest.approx(step)
    assert {one["train_count"] for one in second.figures.values()} == {2}
    assert first.failures == {}
    assert recorder.start is not None
    assert recorder.start.workers == 2
    assert (recorder.progress[-1].kind, recorder.progress[-1].done) == ("evaluate", 6)
    assert result.peak_memory_bytes > 10_000_000


def test_bad_updates_and_a_worker_that_dies_are_failures_of_their_clients(functions: Task) -> None:
    recorder = Recorder()
    faults = "1=raise,2=nan,3=shape,4=kill"
    result = simulate(settings(functions, rounds=1, config={"faults": faults}), recorder)

    (one,) = result.rounds
    assert set(one.participants) == {"client-0000", "client-0005"}
    np.testing.assert_allclose(result.model["w"], mean_step(0, 5), rtol=1e-6)
    assert "no data" in one.failures["client-0001"]
    assert "NaN" in one.failures["client-0002"]
    assert "shape (5,)" in one.failures["client-0003"]
    assert "SIGKILL" in one.failures["client-0004"]
    assert "no memory left" in one.failures["client-0004"]
    assert result.lost_workers >= 1
    assert "It was replaced" in recorder.warnings[0]


def test_a_message_over_its_limit_ends_its_worker_only(functions: Task) -> None:
    recorder = Recorder()
    result = simulate(settings(functions, rounds=1, config={"faults": "2=sleep"}, round_s=1.0), recorder)
    (one,) = result.rounds
    assert "no reply within 1 s" in one.failures["client-0002"]
    assert len(one.participants) == 5
    assert all("was ended: it took longer than 1 s (round-s)" in warning for warning in recorder.warnings)
    assert not any("SIGKILL" in warning or "memory" in warning for warning in recorder.warnings)
    assert recorder.warnings


def test_an_app_that_cannot_be_imported_is_a_bad_task(functions: Task) -> None:
    for file in Path(functions.path).rglob("functions.py"):
        file.write_text("import no_such_module_here\n")
    with pytest.raises(BadTask, match="no_such_module_here"):
        simulate(settings(functions))


def test_an_app_that_only_workers_cannot_import_is_a_bad_task(functions: Task) -> None:
    for file in Path(functions.path).rglob("faults.py"):
        check = f"import os\nif os.getpid() != {os.getpid()}:\n    raise RuntimeError('not here')\n"
        file.write_text(check + file.read_text())
    with pytest.raises(BadTask, match="not here"):
        simulate(settings(functions))


def test_flower_superlink_is_refused_with_the_alternative(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match='library = "flower"'):
        simulate(settings(write_task(tmp_path, "flower-superlink")))


def test_an_observer_that_raises_ends_the_simulation(functions: Task) -> None:
    class Stops(SilentObserver):
        def on_round(self, result: RoundResult, model: Arrays) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings(functions), Stops())


PROGRAM = """
import sys
from pathlib import Path
from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

task = read_task(Path(sys.argv[1]), open_library)
simulate(SimulationSettings(task=task, clients=4, workers=2, rounds=1, config={"faults": "0=sleep,1=sleep"}))
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_the_workers_end_with_their_simulation(functions: Task, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, functions.path], stderr=subprocess.DEVNULL)
    try:
        children = _wait_for_workers(process.pid)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def _wait_for_workers(pid: int) -> list[psutil.Process]:
    """Wait until the template and two busy workers run, and return them."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        children = descendants_of(pid)
        if len(children) >= 3:
            return children
        threading.Event().wait(0.02)
    raise AssertionError("the workers did not start")
