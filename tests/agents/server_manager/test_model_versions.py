"""Versions of a task whose runs change the arrays, or leave them as they are."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.agents.server_manager.model_versions import ModelVersions
from fedbus.contracts.identifiers import task_id
from fedbus.contracts.model import Manifest
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.situations import ServerPublishing
from fedbus.contracts.task.task import TaskTable
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return open_model_store(str(tmp_path / "models"), task_id("tiny"))


class Versions:
    """Publishes versions of one task, each the result of a run from the version before."""

    def __init__(self, store: ModelStore, directory: Path) -> None:
        self.store = store
        self.versions = ModelVersions(None, "tiny", store)  # type: ignore[arg-type]  # these methods use no bus
        self._directory = directory

    async def first(self, *, new_lineage: bool = False, **arrays: np.ndarray[Any, Any]) -> Manifest:
        artifact = await self._put(arrays)
        return await self.versions.publish_first(artifact, code_version="a", new_lineage=new_lineage)

    async def run(
        self, base: Manifest, *, last: RoundResult | None = None, **arrays: np.ndarray[Any, Any]
    ) -> Manifest:
        return await self.versions.publish(await self.publishing(base, last=last, **arrays))

    async def publishing(
        self, base: Manifest, *, last: RoundResult | None = None, **arrays: np.ndarray[Any, Any]
    ) -> ServerPublishing:
        return ServerPublishing(
            run=f"tiny-{base.version}",
            plan=RunPlan(),
            recruit_until=datetime.now(UTC),
            code_version="a",
            model=base.ref,
            base=base.ref,
            cohort=(),
            traceparent="",
            round=0,
            trainings=0,
            failures=0,
            last=last,
            result=await self._put(arrays),
        )

    async def _put(self, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
        path = self._directory / "file.safetensors"
        artifact = weights.save(arrays, path)
        await self.store.put(path, artifact.sha256)
        return artifact


@pytest.fixture
async def versions(store: ModelStore, tmp_path: Path) -> Versions:
    await store.prepare()
    return Versions(store, tmp_path)


async def test_arrays_that_a_run_has_changed_are_free(versions: Versions) -> None:
    first = await versions.first(trees=np.zeros(3))
    same = await versions.run(first, trees=np.ones(3))
    grown = await versions.run(same, trees=np.ones(5))
    assert [await versions.versions.has_free_architecture(one.ref) for one in (first, same, grown)] == [
        False,
        False,
        True,
    ]


async def test_the_first_model_of_a_lineage_is_not_free(versions: Versions) -> None:
    await versions.first(w=np.zeros(3))
    other = await versions.first(w=np.zeros(5), new_lineage=True)
    assert not await versions.versions.has_free_architecture(other.ref)
    assert not await versions.versions.has_free_architecture((await versions.run(other, w=np.ones(5))).ref)


async def test_what_a_task_without_a_builder_learns_is_free(versions: Versions) -> None:
    result = await versions.run(await versions.first(), w=np.ones(2))
    assert await versions.versions.has_free_architecture(result.ref)


async def test_versions_with_the_same_weights_keep_their_file(versions: Versions) -> None:
    """A run without arrays makes a version with the weights of its base, which is retired later."""
    version = await versions.first(w=np.zeros(2))
    for _ in range(4):
        version = await versions.run(version, w=np.zeros(2))
    assert (version.version, version.parent) == (5, 4)
    assert await versions.store.retire(keep=2) == []
    assert weights.load(await versions.store.local_path(version.sha256))["w"].tolist() == [0, 0]


async def test_a_version_that_no_client_could_evaluate_is_not_promoted(versions: Versions) -> None:
    """It has the reason of the last round, and the gate refuses it."""
    failure = "no client could evaluate the model: c1: no data"
    last = RoundResult(round=1, metrics={"train_loss": 0.5}, evaluation_failure=failure)
    run = await versions.publishing(await versions.first(w=np.zeros(3)), last=last, w=np.ones(3))
    version = await versions.versions.publish(run)
    verdict = await versions.versions.judge(TaskTable(task="tiny"), version, run)
    assert version.evaluation_failure == failure
    assert (verdict.promote, verdict.reason) == (False, failure)
