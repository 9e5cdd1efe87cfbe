"""Flower strategies by configuration: the MNIST example, three clients, a run of one round."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from support import NatsServer
from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import FederationHarness, open_federation

from fedbus.contracts.run import RunState
from fedbus.learning import weights
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.models.open import open_model_store
from fedbus.stores.tasks.task_directory import read_task

MNIST = Path(__file__).parents[2] / "examples" / "mnist"
SMALL_TRAINING = {"max-samples": 64, "local-epochs": 1, "data": ""}


@pytest.fixture
async def fed(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FederationHarness]:
    """A federation of the MNIST example with the digits of scikit-learn, which need no download."""
    monkeypatch.delenv("FEDBUS_DATA_DIR", raising=False)
    shutil.copytree(MNIST, tmp_path / "mnist", ignore=shutil.ignore_patterns("__pycache__"))
    async with open_federation(nats.url, tmp_path, task=read_task(tmp_path / "mnist", open_library)) as fed:
        fed.override_plan(rounds=1, quorum=3, recruit_s=60, round_s=60)
        yield fed


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "krum",  # compares the updates, so it cannot aggregate them one by one
        "fedprox",
        "fedadam",
    ],
)
async def test_a_strategy_can_be_chosen_by_configuration(fed: FederationHarness, strategy: str) -> None:
    fed.clear_schedule()
    async with run_all_agents(fed, clients=3):
        before = await latest_weights(fed)
        run = await start_run(fed, config={**SMALL_TRAINING, "strategy": strategy})
        facts = await wait_for_run_end(fed, run)
        assert fed.last_transition("run", run).target == RunState.FINISHED, fed.last_transition(
            "run", run
        ).reason
        assert facts.rounds[-1].participants == {"c1": 64, "c2": 64, "c3": 64}
        assert not facts.rounds[-1].failures
        assert distance(before, await latest_weights(fed)) > 0


async def latest_weights(fed: FederationHarness) -> weights.Arrays:
    store = open_model_store(fed.config.store_url, fed.config.task.id)
    manifest = await store.read_latest()
    assert manifest is not None
    return weights.load(await store.local_path(manifest.sha256))


def distance(first: weights.Arrays, second: weights.Arrays) -> float:
    return float(np.sqrt(sum(np.square(first[name] - second[name]).sum() for name in first)))
