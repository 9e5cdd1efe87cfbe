"""The champion on every backend: one writer per term, and weights for a roll-back."""

import asyncio
import math
from pathlib import Path

import pytest
from support.model_versions import champion, digest, manifest

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.interface import ChampionConflict
from fedbus.stores.models.open import ModelStore, VersionMissing, VersionTaken, open_model_store


def content(version: int) -> bytes:
    return b"weights of %d" % version


@pytest.fixture
async def store(store_url: str) -> ModelStore:
    """A repository with five versions and no champion."""
    store = open_model_store(store_url, "mnist")
    await store.prepare()
    for version in range(1, 6):
        await store.put(content(version))
        await store.publish(manifest(version, content(version)))
    return store


async def test_a_new_repository_has_no_champion(store: ModelStore) -> None:
    assert await store.read_champion() is None


async def test_a_champion_can_be_set_twice_and_is_read_unchanged(store: ModelStore) -> None:
    first = champion(2, 1)
    assert await store.set_champion(first) == first
    assert await store.set_champion(first) == first
    assert await store.read_champion() == first


@pytest.mark.parametrize("term", [1, 3])
async def test_a_champion_with_a_wrong_term_is_rejected(store: ModelStore, term: int) -> None:
    first = await store.set_champion(champion(2, 1))
    with pytest.raises(ChampionConflict, match="version 2 has term 1; read it and decide again"):
        await store.set_champion(champion(3, term, 2))
    assert await store.read_champion() == first


async def test_a_missing_version_cannot_be_champion(store: ModelStore) -> None:
    with pytest.raises(VersionMissing):
        await store.set_champion(champion(9, 1))
    assert await store.read_champion() is None


async def test_of_concurrent_champions_exactly_one_succeeds(store: ModelStore) -> None:
    other = open_model_store(store.url, "mnist")
    await store.set_champion(champion(1, 1))
    results = await asyncio.gather(
        store.set_champion(champion(2, 2, 1)), other.set_champion(champion(3, 2, 1)), return_exceptions=True
    )
    champions = [result for result in results if isinstance(result, Champion)]
    assert len(champions) == 1
    assert [type(result) for result in results if not isinstance(result, Champion)] == [ChampionConflict]
    assert await store.read_champion() == champions[0]


async def test_weights_for_a_roll_back_are_never_removed(store: ModelStore) -> None:
    await store.set_champion(champion(2, 1))
    await store.set_champion(champion(4, 2, 2))
    assert (
        await store.retire(keep=1) == []
    )  # 5 is new, 4 serves and 3 is its parent, 2 served and 1 is its parent
    await store.set_champion(champion(5, 3, 4, 2))
    assert await store.retire(keep=1) == sorted(digest(content(version)) for version in (1, 2))
    assert await store.list_artifacts() == {digest(content(version)) for version in (3, 4, 5)}


async def test_a_version_with_a_nan_loss_can_be_read(store: ModelStore) -> None:
    await store.put(content(6))
    published = manifest(6, content(6)).model_copy(
        update={"metrics": {"loss": math.nan, "accuracy": math.inf}}
    )
    await store.publish(published)
    latest = await store.read_latest()
    assert latest is not None
    assert math.isnan(latest.metrics["loss"])
    assert latest.metrics["accuracy"] == math.inf


async def test_a_manifest_with_a_nan_loss_can_be_published_twice(store: ModelStore) -> None:
    """A publisher repeats a publish after a lost response, with the manifest from its checkpoint."""
    await store.put(content(6))
    published = manifest(6, content(6)).model_copy(
        update={"metrics": {"loss": math.nan, "eval_loss": -math.inf}}
    )
    await store.publish(published)
    read = Manifest.model_validate_json(published.model_dump_json())
    assert await store.publish(read) == read
    with pytest.raises(VersionTaken):
        await store.publish(published.model_copy(update={"metrics": {"loss": 0.1, "eval_loss": -math.inf}}))


@pytest.mark.parametrize("content", ["", "{", '{"version": 0, "term": 1}'])
async def test_an_invalid_champion_pointer_is_corrupt(tmp_path: Path, content: str) -> None:
    store = open_model_store(str(tmp_path / "models"), "mnist")
    await store.prepare()
    (tmp_path / "models" / "mnist" / "champion").write_text(content)
    with pytest.raises(StoreCorrupt, match="it names no champion"):
        await store.read_champion()
