"""The pointer to the version that is served, on every backend: one writer a term, and weights to go back to."""

import asyncio
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from stores.models.test_stores import digest, manifest

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.interface import ChampionConflict
from fedbus.stores.models.open import ModelStore, VersionMissing, VersionTaken, open_model_store


def champion(version: int, term: int, *before: int) -> Champion:
    return Champion(version=version, term=term, before=before, since=datetime.now(UTC))


def content(version: int) -> bytes:
    return b"weights of %d" % version


@pytest.fixture
async def store(store_url: str) -> ModelStore:
    """Five versions, and none of them served."""
    store = open_model_store(store_url, "mnist")
    await store.prepare()
    for version in range(1, 6):
        await store.put(content(version))
        await store.publish(manifest(version, content(version)))
    return store


async def test_before_the_first_there_is_no_champion(store: ModelStore) -> None:
    assert await store.read_champion() is None


async def test_a_champion_is_read_as_it_was_crowned_and_twice_is_fine(store: ModelStore) -> None:
    first = champion(2, 1)
    assert await store.set_champion(first) == first
    assert await store.set_champion(first) == first
    assert await store.read_champion() == first


@pytest.mark.parametrize("term", [1, 3])
async def test_a_champion_of_another_term_than_the_next_is_refused(store: ModelStore, term: int) -> None:
    first = await store.set_champion(champion(2, 1))
    with pytest.raises(ChampionConflict, match="version 2 has term 1; read it and decide again"):
        await store.set_champion(champion(3, term, 2))
    assert await store.read_champion() == first


async def test_a_version_that_is_not_there_is_not_crowned(store: ModelStore) -> None:
    with pytest.raises(VersionMissing):
        await store.set_champion(champion(9, 1))
    assert await store.read_champion() is None


async def test_of_two_who_crown_at_once_exactly_one_does(store: ModelStore) -> None:
    other = open_model_store(store.url, "mnist")
    await store.set_champion(champion(1, 1))
    answers = await asyncio.gather(
        store.set_champion(champion(2, 2, 1)), other.set_champion(champion(3, 2, 1)), return_exceptions=True
    )
    crowned = [one for one in answers if isinstance(one, Champion)]
    assert len(crowned) == 1
    assert [type(one) for one in answers if not isinstance(one, Champion)] == [ChampionConflict]
    assert await store.read_champion() == crowned[0]


async def test_room_is_never_made_of_what_may_be_gone_back_to(store: ModelStore) -> None:
    await store.set_champion(champion(2, 1))
    await store.set_champion(champion(4, 2, 2))
    assert (
        await store.retire(keep=1) == []
    )  # 5 is new, 4 serves and 3 is its parent, 2 served and 1 is its parent
    await store.set_champion(champion(5, 3, 4, 2))
    assert await store.retire(keep=1) == sorted(digest(content(version)) for version in (1, 2))
    assert await store.list_artifacts() == {digest(content(version)) for version in (3, 4, 5)}


async def test_a_version_with_a_loss_that_is_no_number_can_be_read(store: ModelStore) -> None:
    await store.put(content(6))
    made = manifest(6, content(6)).model_copy(update={"metrics": {"loss": math.nan, "accuracy": math.inf}})
    await store.publish(made)
    latest = await store.read_latest()
    assert latest is not None
    assert math.isnan(latest.metrics["loss"])
    assert latest.metrics["accuracy"] == math.inf


async def test_the_same_manifest_twice_is_fine_with_a_loss_that_is_no_number_too(store: ModelStore) -> None:
    """As after an answer that was lost: the publisher asks again, with what it read from its checkpoint."""
    await store.put(content(6))
    made = manifest(6, content(6)).model_copy(update={"metrics": {"loss": math.nan, "eval_loss": -math.inf}})
    await store.publish(made)
    read_again = Manifest.model_validate_json(made.model_dump_json())
    assert await store.publish(read_again) == read_again
    with pytest.raises(VersionTaken):
        await store.publish(made.model_copy(update={"metrics": {"loss": 0.1, "eval_loss": -math.inf}}))


@pytest.mark.parametrize("written", ["", "{", '{"version": 0, "term": 1}'])
async def test_a_pointer_that_makes_no_sense_is_damage_and_not_the_lack_of_one(
    tmp_path: Path, written: str
) -> None:
    store = open_model_store(str(tmp_path / "models"), "mnist")
    await store.prepare()
    (tmp_path / "models" / "mnist" / "champion").write_text(written)
    with pytest.raises(StoreCorrupt, match="it names no champion"):
        await store.read_champion()
