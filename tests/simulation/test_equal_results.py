"""The same app with the same seed: on a fleet, in the simulator and in Flower's own simulation.

The fleet and the simulator derive the random numbers of the app from the seed of the run, and with `deterministic` they
add updates in the same order: the same bits. Flower's simulation has no seed, so the app that is compared with it
draws its numbers itself. Its replies come in any order, so the metrics are equal within the rounding of float sums.
"""

import hashlib
import importlib.util
import sys
import textwrap
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import NatsServer
from support.all_agents import run_client_side, run_server_side, start_run
from support.federation import open_federation

from fedbus.contracts.run import RUN, RoundResult, RunData
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.weights import Arrays
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.models.open import open_model_store
from fedbus.stores.tasks.task_directory import read_task

CLIENTS, ROUNDS, SEED = 4, 3, 11

FLOWER_APP = """
import random

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()


def generator(msg, context):
    if context.run_config["own-seed"]:
        part = int(context.node_config["partition-id"])
        return np.random.default_rng([part, msg.content["config"]["server-round"]])
    return np.random


@client.train()
def train(msg, context):
    (x,) = msg.content["arrays"].to_numpy_ndarrays()
    noise = np.asarray(generator(msg, context).normal(size=x.shape), np.float32)
    samples = 7 + int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": samples, "train_loss": float(np.abs(noise).mean())})
    return Message(RecordDict({"arrays": ArrayRecord([x * 0.9 + noise]), "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg, context):
    (x,) = msg.content["arrays"].to_numpy_ndarrays()
    part = int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": 7 + part, "eval_loss": float(((x - part) ** 2).mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid, context):
    fraction = context.run_config["fraction"]
    strategy = FedAvg(
        fraction_train=fraction, fraction_evaluate=1.0, min_train_nodes=2, min_available_nodes=4
    )
    start = np.full(1000, random.random() if context.run_config["random-start"] else 0.5, np.float32)
    result = strategy.start(grid, ArrayRecord([start]), num_rounds=context.run_config["num-server-rounds"])
    global RESULT
    RESULT = result


RESULT = None
"""

PYPROJECT = """
[project]
name = "equal"

[tool.fedbus]
quorum = 4
round-s = 60

[tool.flwr.app.components]
serverapp = "equal_app:server"
clientapp = "equal_app:client"

[tool.flwr.app.config]
num-server-rounds = 3
own-seed = false
fraction = 0.5
random-start = true
"""

FUNCTIONS_PYPROJECT = """
[project]
name = "equal"

[tool.fedbus]
task = "equal"
library = "functions"
functions = "equal_functions.functions"
"""

FUNCTIONS = """
import numpy as np

def load(partition_id):
    return partition_id

def initial(config):
    return {"w": np.linspace(-1, 1, 500, dtype=np.float32)}

def train(weights, data, config):
    weights["w"] += np.random.normal(size=500).astype(np.float32)
    return weights, {"train_loss": float(np.random.random())}, 3 + data

def evaluate(weights, data, config):
    return {"eval_loss": float((weights["w"] ** 2).mean())}, 1
"""


@dataclass
class WorldOutcome:
    """The metrics of each round, and the final model."""

    metrics: dict[int, dict[str, float]]
    model: Arrays

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, array in sorted(self.model.items()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, rounds: list[RoundResult] | tuple[RoundResult, ...], model: Arrays) -> "WorldOutcome":
        return cls({one.round: dict(one.metrics) for one in rounds if one.round}, model)


def flower_task(directory: Path, **config: Any) -> Task:
    path = directory / "equal_task"
    path.mkdir()
    (path / "equal_app.py").write_text(textwrap.dedent(FLOWER_APP))
    (path / "pyproject.toml").write_text(PYPROJECT)
    task = read_task(path, open_library)
    return task.model_copy(update={"run_config": {**task.run_config, **config}})


def functions_task(directory: Path) -> Task:
    package = directory / "task" / "equal_functions"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    (package.parent / "pyproject.toml").write_text(FUNCTIONS_PYPROJECT)
    return read_task(package.parent, open_library)


def run_simulation(task: Task, **settings: Any) -> WorldOutcome:
    options = {"clients": CLIENTS, "rounds": ROUNDS, "seed": SEED, "workers": 2, **settings}
    result = simulate(SimulationSettings(task=task, **options))
    return WorldOutcome.of(result.rounds, result.model)


async def run_on_fleet(nats: NatsServer, directory: Path, task: Task, *, deterministic: bool) -> WorldOutcome:
    """Run the task on a fleet whose clients have the names of simulated ones."""
    names = SimulationSettings(task=task, clients=CLIENTS).client_names
    async with AsyncExitStack() as stack:
        fed = await stack.enter_async_context(open_federation(nats.url, directory, task=task))
        await stack.enter_async_context(run_server_side(fed))
        for number, name in enumerate(names):
            await stack.enter_async_context(run_client_side(fed, name, number, CLIENTS))
        for name in names:
            await fed.wait_for_state("client", "serving", f"{name}.{task.id}", within_s=90)
        run = await start_run(
            fed, rounds=ROUNDS, quorum=CLIENTS, seed=SEED, deterministic=deterministic or None
        )
        await fed.wait_until(lambda: fed.last_transition("run", run).target in RUN.final, run, 90)
        facts = fed.last_transition("run", run).facts
        assert isinstance(facts, RunData)
        assert facts.model is not None, fed.last_transition("run", run).reason
        store = open_model_store(fed.config.store_url, task.id)
        return WorldOutcome.of(facts.rounds, weights.load(await store.local_path(facts.model.sha256)))


def run_in_flower_simulation(task: Task, directory: Path) -> WorldOutcome:
    """Run the app in Flower's own simulation, with the ClientApp called in this process."""
    under_flower = pytest.importorskip("differential.under_flower")
    from differential.cases import App, FlowerCase  # noqa: PLC0415 - registers the cases of Flower

    spec = importlib.util.spec_from_file_location("equal_app", Path(task.path) / "equal_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["equal_app"] = module
    try:
        spec.loader.exec_module(module)

        def register(app: App) -> None:
            app.server, app.client = module.server, module.client

        case = FlowerCase("equal", "", register, clients=CLIENTS, config=dict(task.run_config))
        recording = under_flower.run_under_flower(case, directory)
    finally:
        del sys.modules["equal_app"]
    assert recording["outcome"] == [None], recording
    result = module.RESULT
    metrics: dict[int, dict[str, float]] = {}
    for by_round in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
        for number, record in by_round.items():
            metrics.setdefault(number, {}).update(dict(record))
    arrays = {str(index): one for index, one in enumerate(result.arrays.to_numpy_ndarrays())}
    return WorldOutcome(metrics, arrays)


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    task = functions_task(tmp_path)
    one = run_simulation(task, deterministic=True, workers=1, cohort=3)
    three = run_simulation(task, deterministic=True, workers=3, cohort=3)

    assert one.metrics == three.metrics
    assert one.sha256 == three.sha256


@pytest.mark.slow
def test_another_seed_gives_another_result(tmp_path: Path) -> None:
    task = functions_task(tmp_path)

    assert run_simulation(task).sha256 != run_simulation(task, seed=SEED + 1).sha256


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("library", ["flower", "functions"])
async def test_fleet_and_simulator_give_the_same_bits(nats: NatsServer, tmp_path: Path, library: str) -> None:
    """The app draws from the global generators, and its strategy samples clients."""
    task = flower_task(tmp_path) if library == "flower" else functions_task(tmp_path)
    simulated = run_simulation(task, deterministic=True)
    fleet = await run_on_fleet(nats, tmp_path, task, deterministic=True)

    assert fleet.metrics == simulated.metrics
    assert fleet.sha256 == simulated.sha256


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_fleet_simulator_and_flower_give_the_same_metrics(nats: NatsServer, tmp_path: Path) -> None:
    task = flower_task(tmp_path, **{"own-seed": True, "fraction": 1.0, "random-start": False})
    outcomes = {
        "fleet": await run_on_fleet(nats, tmp_path, task, deterministic=False),
        "simulator": run_simulation(task),
        "flower": run_in_flower_simulation(task, tmp_path / "flower"),
    }

    expected = outcomes.pop("flower")
    assert len(expected.metrics) == ROUNDS
    for name, outcome in outcomes.items():
        for number, metrics in expected.metrics.items():
            assert outcome.metrics[number] == pytest.approx(metrics, rel=1e-5), (name, number)
        for mine, theirs in zip(outcome.model.values(), expected.model.values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
