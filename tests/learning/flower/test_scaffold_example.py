"""examples/scaffold: the algorithm of docs/new-algorithm.md, on the bus and in simulation."""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning.flower.bus_run import BusRunResult, run_on_bus

from fedbus.contracts.run import Scalar
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import ClientSession
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task, validate_task

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "scaffold"
CLIENTS, ROUNDS = 5, 11
CONFIG: dict[str, Scalar] = {"local-epochs": 10, "lr": 0.05, "strategy": "scaffold"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scikit-learn's digits in the format of MNIST."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import

    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8)
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    for name, rows in (("train", slice(0, 1400)), ("t10k", slice(1400, None))):
        for kind, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            shape = np.array(array.shape, ">u4").tobytes()
            content = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
            (folder / "mnist" / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.fixture
def folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBUS_DATA_DIR", str(data_dir))


async def train(strategy: str) -> BusRunResult:
    config = {**CONFIG, "strategy": strategy}
    return await run_on_bus(
        EXAMPLE, clients=CLIENTS, rounds=ROUNDS, seed=2, deterministic=True, config=config
    )


def test_the_example_is_valid() -> None:
    assert validate_task(EXAMPLE, open_library) == []


def test_the_guide_has_the_algorithm_in_under_80_lines() -> None:
    code = (EXAMPLE / "scaffold_app" / "scaffold.py").read_text()
    assert len(code.splitlines()) < 80
    guide = (ROOT / "docs" / "new-algorithm.md").read_text()
    assert code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
async def test_scaffold_learns_more_than_fedavg_from_skewed_labels() -> None:
    scaffold, fedavg = await train("scaffold"), await train("fedavg")
    mean_of_last = [np.mean(run.metric("accuracy")[-4:]) for run in (scaffold, fedavg)]
    assert mean_of_last[0] > mean_of_last[1] + 0.03

    controls = [read_control(session) for session in scaffold.sessions.values()]
    assert all(np.abs(control).max() > 0 for control in controls)
    assert not np.allclose(controls[0], controls[1])


def read_control(session: ClientSession) -> np.ndarray[Any, Any]:
    """Return the control variate that the client keeps, for one array of the model."""
    assert isinstance(session, ClientAppHost)
    return session._context.state.array_records["control"]["1.bias"].numpy()


@pytest.mark.usefixtures("folder")
async def test_the_fleet_and_the_simulation_give_the_same_metrics() -> None:
    settings = SimulationSettings(
        task=read_task(EXAMPLE, open_library),
        clients=CLIENTS,
        rounds=2,
        workers=1,
        seed=2,
        deterministic=True,
        config={**CONFIG, "local-epochs": 1},
    )
    simulated = simulate(settings)
    run = await run_on_bus(
        EXAMPLE, clients=CLIENTS, rounds=2, seed=2, deterministic=True, config={**settings.config}
    )
    assert run.metric("loss") == [result.metrics["loss"] for result in simulated.rounds]


@pytest.mark.usefixtures("folder")
async def test_a_recovered_run_continues_in_its_round() -> None:
    config = {**CONFIG, "local-epochs": 1}
    run = await run_on_bus(EXAMPLE, clients=2, rounds=3, first_round=2, seed=1, config=config)
    assert [result.round for result in run.rounds] == [2, 3]
    assert all(not result.failures for result in run.rounds)
