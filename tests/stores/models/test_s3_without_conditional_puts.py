"""Model repositories in an S3 that ignores or rejects conditional puts: a lock object takes their place."""

import asyncio

import pytest
from structlog.testing import capture_logs
from support.model_versions import champion, manifest
from support.s3_models import key, open_s3_store, publish_two_versions

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.models import s3 as models_s3
from fedbus.stores.models.interface import ChampionConflict
from fedbus.stores.models.open import VersionTaken
from fedbus.stores.s3 import lock
from fedbus.stores.s3.bucket import Bucket, BucketAddress, ConditionalPutsUnsupported


class IgnoresConditions(Bucket):
    """A bucket in an S3 that ignores conditions: every put succeeds."""

    async def create(self, key: str, content: bytes) -> bool:
        await self.write(key, content)
        return True

    async def replace(self, key: str, content: bytes, tag: str) -> bool:
        await self.write(key, content)
        return True


class RejectsConditions(Bucket):
    """A bucket in an S3 that rejects conditional puts."""

    async def create(self, key: str, content: bytes) -> bool:
        raise ConditionalPutsUnsupported

    async def replace(self, key: str, content: bytes, tag: str) -> bool:
        raise ConditionalPutsUnsupported


@pytest.fixture(params=[IgnoresConditions, RejectsConditions])
def plain_url(request: pytest.FixtureRequest, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in an S3 without conditional puts."""
    monkeypatch.setattr(models_s3, "Bucket", request.param)
    return s3_url


async def test_without_conditional_puts_a_lock_is_used_and_logged(
    plain_url: str,
) -> None:
    with capture_logs() as lines:
        store = await publish_two_versions(plain_url)
    assert [line["event"] for line in lines] == ["S3 does not support conditional puts; using a lock object"]
    assert [manifest.version for manifest in await store.list_versions()] == [1, 2]
    with pytest.raises(VersionTaken):
        await store.publish(manifest(2, run="mnist-9"))


async def test_with_the_lock_exactly_one_publisher_succeeds(plain_url: str) -> None:
    await publish_two_versions(plain_url)
    stores = [open_s3_store(plain_url) for _ in range(3)]
    results = await asyncio.gather(
        *(store.publish(manifest(3, run=f"run-{n}")) for n, store in enumerate(stores)),
        return_exceptions=True,
    )
    names = sorted(type(result).__name__ for result in results)
    assert names == ["Manifest", "VersionTaken", "VersionTaken"]
    assert await stores[0].read_latest() in [result for result in results if isinstance(result, Manifest)]


async def test_with_the_lock_exactly_one_champion_is_set(plain_url: str) -> None:
    await publish_two_versions(plain_url)
    first = await open_s3_store(plain_url).set_champion(champion(1, 1))
    candidates = [champion(1, 2, 1), champion(2, 2, 1), champion(2, 2)]
    results = await asyncio.gather(
        *(open_s3_store(plain_url).set_champion(candidate) for candidate in candidates),
        return_exceptions=True,
    )
    champions = [result for result in results if isinstance(result, Champion)]
    assert sorted(type(result).__name__ for result in results) == [
        "Champion",
        "ChampionConflict",
        "ChampionConflict",
    ]
    assert await open_s3_store(plain_url).read_champion() == champions[0]
    with pytest.raises(ChampionConflict):
        await open_s3_store(plain_url).set_champion(first)


async def test_the_claim_of_a_dead_publisher_expires(plain_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await Bucket(BucketAddress.parse(plain_url)).write(key(plain_url, "lock/left-behind"), b"claim\n")
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    await publish_two_versions(plain_url)
