"""A simulated model as a version of the task's repository: when it becomes the champion."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.federation import tiny_task

from fedbus.app.failures import CliError
from fedbus.app.settings import Settings
from fedbus.app.simulate.publishing import PublishedModel, SimulatedModel, publish
from fedbus.contracts.model import Manifest, SimulationOrigin
from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store
from fedbus.stores.models.signing import TrustedKeys, generate_key

ORIGIN = SimulationOrigin(clients=20, cohort=4, seed=7, partition="dirichlet:0.3")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return tiny_task(tmp_path)


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return open_model_store(str(tmp_path / "models"), "tiny")


Simulate = Callable[..., SimulatedModel]


@pytest.fixture
def simulated(tmp_path: Path) -> Simulate:
    def make(
        name: str, value: float, loss: float, *, size: int = 3, parent: Manifest | None = None
    ) -> SimulatedModel:
        path = tmp_path / f"{name}.safetensors"
        weights.save({"w": np.full(size, value, np.float32)}, path)
        rounds = [RoundResult(round=1, metrics={"loss": loss}, participants={"client-0001": 9})]
        return SimulatedModel(path, name, rounds, {"lr": 0.5}, ORIGIN, parent)

    return make


async def publish_here(model: SimulatedModel, task: Task, models: ModelStore, home: Path) -> PublishedModel:
    return await publish(model, task, models, Settings(home=home), ask_server=False)


async def test_the_first_version_is_the_champion(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    published = await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    champion = await models.read_champion()

    assert published.is_champion
    assert champion is not None
    assert (champion.version, champion.term) == (1, 1)


async def test_the_manifest_states_the_simulation(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    manifest = await models.read_manifest(1)

    assert manifest.simulation == ORIGIN
    assert (manifest.run, manifest.rounds, manifest.config, manifest.lineage, manifest.parent) == (
        "sim-1",
        1,
        {"lr": 0.5},
        1,
        None,
    )
    assert manifest.code_version == task.code_version
    assert weights.load(await models.local_path(manifest.sha256))["w"].tolist() == [1, 1, 1]


async def test_publishing_twice_makes_one_version(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    for _ in range(2):
        published = await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)

    assert published.is_champion
    assert await models.list_version_numbers() == [1]


async def test_a_better_model_replaces_the_champion(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    published = await publish_here(simulated("sim-2", 2, 0.4), task, models, tmp_path)
    champion = await models.read_champion()

    assert (published.is_champion, published.manifest.lineage) == (True, 2)
    assert champion is not None
    assert (champion.version, champion.term, champion.before) == (2, 2, (1,))


async def test_a_model_that_the_gate_rejects_is_stored_only(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    published = await publish_here(simulated("sim-2", 2, 5.0), task, models, tmp_path)
    champion = await models.read_champion()

    assert not published.is_champion
    assert "900.0 % worse" in published.reason
    assert champion is not None
    assert champion.version == 1
    assert await models.list_version_numbers() == [1, 2]


async def test_another_architecture_is_not_promoted(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    published = await publish_here(simulated("sim-2", 2, 0.1, size=4), task, models, tmp_path)

    assert not published.is_champion
    assert "its architecture differs" in published.reason


async def test_a_model_that_began_with_a_version_is_its_child(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    first = await publish_here(simulated("sim-1", 1, 0.5), task, models, tmp_path)
    child = await publish_here(simulated("sim-2", 2, 0.4, parent=first.manifest), task, models, tmp_path)
    late = await publish_here(simulated("sim-3", 3, 0.3, parent=first.manifest), task, models, tmp_path)

    assert (child.manifest.parent, child.manifest.lineage) == (1, 1)
    assert not late.is_champion
    assert "it began with version 1, but the champion is version 2 now" in late.reason


async def test_a_diverged_model_is_no_first_version(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    with pytest.raises(CliError, match="not published: loss is nan"):
        await publish_here(simulated("sim-1", 1, float("nan")), task, models, tmp_path)

    assert await models.read_latest() is None


async def test_the_version_is_signed(
    simulated: Simulate, task: Task, models: ModelStore, tmp_path: Path
) -> None:
    public = generate_key(tmp_path / "key")
    settings = Settings(home=tmp_path, signing_key=tmp_path / "key")
    await publish(simulated("sim-1", 1, 0.5), task, models, settings, ask_server=False)

    TrustedKeys.load(public).verify_manifest(await models.read_manifest(1))
