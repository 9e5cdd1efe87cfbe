"""A model repository in S3 and its faults, with a real SeaweedFS behind a faulty proxy."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from stores.models.test_champion import champion
from stores.models.test_stores import WEIGHTS, digest, manifest
from structlog.testing import capture_logs
from support import eventually
from support.s3_server import FaultyProxy, run_faulty_proxy

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.contracts.champion import Champion
from fedbus.contracts.identifiers import TaskId
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreError, StoreUnavailable
from fedbus.stores.models import s3 as models_s3
from fedbus.stores.models.artifact_cache import ArtifactCache
from fedbus.stores.models.interface import ChampionConflict
from fedbus.stores.models.object_store import DownloadSink
from fedbus.stores.models.open import (
    ArtifactMissing,
    DigestMismatch,
    ModelRepository,
    UnknownStore,
    VersionTaken,
    open_model_store,
)
from fedbus.stores.models.s3 import S3ObjectStore
from fedbus.stores.s3 import lock
from fedbus.stores.s3.bucket import PART_BYTES, Bucket, BucketAddress, ConditionalPutsUnsupported
from fedbus.stores.s3.client import _session

MNIST = TaskId("mnist")
LARGE = os.urandom(2 * PART_BYTES + 12345)
"""An artifact that is uploaded in three parts."""
MIN_PART_BYTES = 5 * 1024**2
"""The limit of S3 for a part that is not the last."""
MEDIUM = LARGE[: MIN_PART_BYTES + 12345]
"""An artifact that is uploaded in two such parts."""


@pytest.fixture
async def proxy(s3: EmbeddedS3) -> AsyncIterator[FaultyProxy]:
    async with run_faulty_proxy(s3.port) as proxy:
        yield proxy


@pytest.fixture
def far_url(s3_url: str, s3: EmbeddedS3, proxy: FaultyProxy) -> str:
    """The same place, at the end of the road."""
    return s3_url.replace(f":{s3.port}", f":{proxy.port}")


@pytest.fixture
def bucket(s3: EmbeddedS3, s3_url: str) -> Bucket:
    """The place itself, to look into and to spoil."""
    return Bucket(BucketAddress.parse(s3_url))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload the smallest parts, which take little CPU time."""
    monkeypatch.setattr(models_s3, "PART_BYTES", MIN_PART_BYTES)


def open_s3_store(url: str, *, patience_s: float = 20.0, cache: Path | None = None) -> ModelRepository:
    artifact_cache = ArtifactCache(cache) if cache else None
    return ModelRepository(
        S3ObjectStore(BucketAddress.parse(url), MNIST, patience_s=patience_s, cache=artifact_cache)
    )


async def publish_two_versions(url: str) -> ModelRepository:
    store = open_s3_store(url)
    await store.prepare()
    await store.put(WEIGHTS, digest(WEIGHTS))
    await store.publish(manifest(1))
    await store.publish(manifest(2))
    return store


def cached_files(directory: Path) -> list[Path]:
    return list(directory.glob("*.safetensors"))


def key(url: str, name: str) -> str:
    return f"{BucketAddress.parse(url).prefix}/mnist/{name}"


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://AKIA:hush@bucket/models", "must not hold credentials"),
        ("s3://bucket/models?endpoint=http://AKIA:hush@host:1", "must not hold credentials"),
        ("s3:///models", "invalid bucket name"),
        ("s3://Bu/models", "invalid bucket name"),
        ("s3://bucket/models?endpoint=host:8333", "write endpoint=https"),
        ("s3://bucket/models?secret-key=hush", "unknown option 'secret-key'"),
    ],
)
def test_an_invalid_address_is_rejected_without_secrets(url: str, reason: str) -> None:
    with pytest.raises(UnknownStore, match=reason) as error:
        open_model_store(url, "mnist")
    assert "hush" not in str(error.value)


def test_an_address_can_be_passed_to_another_process() -> None:
    url = "s3://bucket/some/models?endpoint=http://127.0.0.1:8333&region=eu-west-1&cache=/var/cache"
    assert open_model_store(url, "mnist").url == url
    assert BucketAddress.parse("s3://bucket").url == "s3://bucket/"


# --- unavailable, denied, corrupt, empty ------------------------------------------------------------


async def test_an_s3_that_does_not_answer_is_unavailable(far_url: str, proxy: FaultyProxy) -> None:
    proxy.close()
    store = open_s3_store(far_url, patience_s=0.2)
    attempts: list[Callable[[], Awaitable[object]]] = [
        store.prepare,
        store.read_latest,
        store.list_versions,
        lambda: store.put(WEIGHTS, digest(WEIGHTS)),
        lambda: store.local_path(digest(WEIGHTS)),
        lambda: store.publish(manifest(1)),
    ]
    for attempt in attempts:
        with pytest.raises(StoreUnavailable, match=r"cannot use s3://fedbus/.*; check that it runs"):
            await attempt()


async def test_a_missing_bucket_is_unavailable_and_named(s3: EmbeddedS3) -> None:
    store = open_s3_store(f"s3://no-such-bucket/models?endpoint={s3.endpoint}")
    for attempt in (store.prepare, store.read_latest, lambda: store.put(WEIGHTS, digest(WEIGHTS))):
        with pytest.raises(StoreUnavailable, match="there is no bucket no-such-bucket; create it"):
            await attempt()


async def test_a_wrong_secret_is_denied_and_not_repeated_in_the_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await publish_two_versions(s3_url)
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(credentials))
    store = open_s3_store(s3_url)
    for attempt in (
        store.prepare,
        store.read_latest,
        store.list_versions,
        lambda: store.local_path(digest(WEIGHTS)),
    ):
        with pytest.raises(StoreDenied, match=r"denied: .*; check the credentials") as denied:
            await attempt()
        assert "hush" not in repr(denied.value)


async def test_missing_credentials_are_reported(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    with pytest.raises(StoreDenied, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        await open_s3_store(s3_url).read_latest()


async def test_credentials_come_from_the_sources_of_the_aws_tools(
    s3_url: str, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key, secret = (line.partition(" = ")[2] for line in s3.credentials.read_text().splitlines())
    monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    _session.cache_clear()  # the session caches credentials
    try:
        await open_s3_store(s3_url).prepare()
    finally:
        _session.cache_clear()


@pytest.mark.parametrize(
    ("settings", "reason", "with_file"),
    [
        ({"AWS_PROFILE": "nobody"}, "nobody", False),
        ({"AWS_PROFILE": "nobody"}, "nobody", True),
        ({"AWS_ACCESS_KEY_ID": "AKIA"}, "Partial credentials", False),
    ],
)
async def test_invalid_aws_settings_are_reported(
    settings: dict[str, str], reason: str, with_file: bool, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_file:
        monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    _session.cache_clear()
    try:
        with pytest.raises(StoreDenied, match=f"{reason}.*; correct the AWS settings"):
            await open_s3_store(s3_url).read_latest()
    finally:
        _session.cache_clear()


@pytest.mark.parametrize("content", [None, "", "nonsense", "[default]\naws_access_key_id = AKIA\n"])
async def test_an_invalid_credentials_file_is_named(
    content: str | None, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(tmp_path / "keys"))
    with pytest.raises(StoreDenied, match=rf"{tmp_path}/keys denied: .*write the lines \[default\]"):
        await open_s3_store(s3_url).read_latest()


async def test_new_credentials_are_used_by_the_next_call(
    s3: EmbeddedS3, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = await publish_two_versions(s3_url)
    file, valid = tmp_path / "credentials", s3.credentials.read_text()
    file.write_text(valid.replace("aws_secret_access_key = ", "aws_secret_access_key = wrong"))
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(file))
    with pytest.raises(StoreDenied):
        await store.read_latest()
    file.write_text(valid)
    assert await store.read_latest() is not None


async def test_a_closed_client_is_opened_again(bucket: Bucket) -> None:
    async with bucket.open() as first, bucket.open() as concurrent:
        assert await bucket.list_objects("nothing") == []
    async with bucket.open() as second:
        assert await bucket.list_objects("nothing") == []
    assert second is first is concurrent


async def test_a_client_that_failed_to_close_is_not_opened_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with bucket.open() as first:
            monkeypatch.setattr(first, "__aexit__", fail)
    await first.close()
    async with bucket.open() as second:
        assert await bucket.list_objects("nothing") == []
    assert second is not first


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": "2"}', b'{"version": 0}', b'{"version": 9}']
)
async def test_an_invalid_pointer_is_corrupt(content: bytes, s3_url: str, bucket: Bucket) -> None:
    store = await publish_two_versions(s3_url)
    await bucket.write(key(s3_url, "latest"), content)
    with pytest.raises(StoreCorrupt, match="is corrupt"):
        await store.read_latest()


async def test_a_missing_pointer_is_corrupt_and_not_empty(s3_url: str, bucket: Bucket) -> None:
    store = await publish_two_versions(s3_url)
    await bucket.delete(key(s3_url, "latest"))
    with pytest.raises(StoreCorrupt, match="there are versions"):
        await store.read_latest()


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 0, "term": 1}', b"\xff"])
async def test_an_invalid_champion_pointer_is_corrupt_and_kept(
    content: bytes, s3_url: str, bucket: Bucket
) -> None:
    store = await publish_two_versions(s3_url)
    await store.set_champion(champion(1, 1))
    await bucket.write(key(s3_url, "champion"), content)
    attempts: list[Callable[[], Any]] = [
        store.read_champion,
        lambda: store.set_champion(champion(2, 2, 1)),
        lambda: store.retire(keep=1),  # the weights in use are not known
    ]
    for attempt in attempts:
        with pytest.raises(StoreCorrupt, match="mnist/champion is corrupt: it names no champion"):
            await attempt()
    assert await store.list_artifacts() == {digest(WEIGHTS)}


async def test_an_invalid_manifest_is_corrupt(s3_url: str, bucket: Bucket) -> None:
    store = await publish_two_versions(s3_url)
    await bucket.write(key(s3_url, "versions/2.json"), b'{"version": 2')
    with pytest.raises(StoreCorrupt, match=r"versions/2\.json is corrupt"):
        await store.read_latest()


@pytest.mark.parametrize("pointer_version", [0, 1])
async def test_the_publish_of_a_dead_publisher_is_finished(
    pointer_version: int, s3_url: str, bucket: Bucket
) -> None:
    store = await publish_two_versions(s3_url)
    if pointer_version:
        await bucket.write(key(s3_url, "latest"), b'{"version": 1}')
    else:
        await bucket.delete(key(s3_url, "latest"))
        await bucket.delete(key(s3_url, "versions/2.json"))
    latest = await store.read_latest()
    assert latest is not None
    assert latest.version == pointer_version + 1
    pointer = await bucket.read(key(s3_url, "latest"))
    assert pointer is not None
    assert pointer.content.strip() == b'{"version": %d}' % latest.version


# --- large artifacts on a faulty network ------------------------------------------------------------


async def test_an_artifact_in_parts_is_read_completely(s3_url: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    store = open_s3_store(s3_url)
    await store.prepare()
    await store.put(tmp_path / "large", digest(LARGE))
    assert (await store.local_path(digest(LARGE))).read_bytes() == LARGE
    await store.verify(digest(LARGE))


@pytest.mark.usefixtures("small_parts")
async def test_parts_with_another_digest_leave_no_object(s3_url: str, bucket: Bucket) -> None:
    store = open_s3_store(s3_url)
    await store.prepare()
    with pytest.raises(DigestMismatch):
        await store.put(MEDIUM, digest(WEIGHTS))
    with pytest.raises(ArtifactMissing):
        await store.verify(digest(WEIGHTS))
    async with bucket.open() as client:
        assert not (await client.list_multipart_uploads(Bucket="fedbus")).get("Uploads")


@pytest.mark.usefixtures("small_parts")
async def test_an_uploaded_artifact_is_not_sent_again(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    await store.put(MEDIUM, digest(MEDIUM))
    sent_bytes = len(proxy.request_bytes)
    await store.put(MEDIUM, digest(MEDIUM))
    assert len(proxy.request_bytes) - sent_bytes < 4096


async def test_a_put_of_the_same_artifact_repairs_a_corrupt_object(s3_url: str, bucket: Bucket) -> None:
    await publish_two_versions(s3_url)
    await bucket.write(key(s3_url, f"{digest(WEIGHTS)}.safetensors"), WEIGHTS[::-1])
    store = open_s3_store(s3_url)
    await store.put(WEIGHTS, digest(WEIGHTS))
    await store.verify(digest(WEIGHTS))


@pytest.mark.usefixtures("small_parts")
async def test_a_put_waits_for_an_unavailable_s3(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    proxy.close()
    put = asyncio.create_task(store.put(MEDIUM, digest(MEDIUM)))
    await asyncio.sleep(0.3)  # the first attempt has failed
    assert not put.done()
    proxy.reopen()
    await put
    await store.verify(digest(MEDIUM))


@pytest.mark.usefixtures("small_parts")
async def test_an_interrupted_upload_continues(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    put = asyncio.create_task(store.put(MEDIUM, digest(MEDIUM)))
    await eventually(lambda: b"partNumber=2" in proxy.request_bytes)
    proxy.close()
    proxy.reopen()
    await put
    await store.verify(digest(MEDIUM))


async def test_an_interrupted_download_continues(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    await store.put(LARGE, digest(LARGE))
    proxy.truncate_responses_at, proxy.response_byte_count = [3 * 1024**2, 5 * 1024**2, 1024**2], 0
    assert (await store.local_path(digest(LARGE))).read_bytes() == LARGE
    assert not proxy.truncate_responses_at
    assert proxy.request_bytes.count(b"Range: bytes=") == 3
    assert (
        proxy.response_byte_count < 1.2 * len(LARGE) + 3 * 1024**2
    )  # a piece is sent twice at each interruption


async def test_a_later_download_continues_an_abandoned_one(
    far_url: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = open_s3_store(far_url, cache=tmp_path)
    await store.prepare()
    await store.put(LARGE, digest(LARGE))
    proxy.truncate_responses_at = [6 * 1024**2]
    proxy.close_on_request = b"Range:"
    with pytest.raises(StoreUnavailable):
        await open_s3_store(far_url, cache=tmp_path, patience_s=0.2).local_path(digest(LARGE))
    proxy.close_on_request, proxy.response_byte_count = None, 0
    proxy.reopen()
    assert (await open_s3_store(far_url, cache=tmp_path).local_path(digest(LARGE))).read_bytes() == LARGE
    assert proxy.response_byte_count < len(LARGE) - 4 * 1024**2


async def test_an_interrupted_read_of_a_manifest_is_repeated(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    await store.put(WEIGHTS, digest(WEIGHTS))
    long = manifest(1).model_copy(update={"participants": {f"c{number}": number for number in range(20_000)}})
    await store.publish(long)
    proxy.truncate_responses_at = [5000, 70_000]
    assert await store.read_manifest(1) == long
    assert not proxy.truncate_responses_at


@pytest.mark.usefixtures("small_parts")
async def test_a_download_that_never_completes_is_unavailable(
    far_url: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    await store.put(MEDIUM, digest(MEDIUM))
    proxy.truncate_responses_at = [1] * 1000
    with pytest.raises(StoreUnavailable, match="check that it runs"):
        await open_s3_store(far_url, cache=tmp_path, patience_s=0.5).local_path(digest(MEDIUM))
    assert not cached_files(tmp_path)


@pytest.mark.usefixtures("small_parts")
async def test_a_slow_upload_does_not_time_out(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url, patience_s=0.1)
    await store.prepare()
    proxy.request_delay_s = 0.006
    await store.put(MEDIUM, digest(MEDIUM))
    proxy.request_delay_s = 0.0
    await store.verify(digest(MEDIUM))


async def test_a_listing_of_artifacts_is_one_request(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    contents = [b"weights %d" % number for number in range(12)]
    for content in contents:
        await store.put(content, digest(content))
    proxy.request_bytes.clear()
    assert await store.list_artifacts() == {digest(content) for content in contents}
    assert proxy.request_bytes.count(b"HTTP/1.1\r\n") == 1


@pytest.mark.usefixtures("small_parts")
async def test_a_slow_download_does_not_time_out(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url, patience_s=0.1)
    await store.prepare()
    await store.put(MEDIUM, digest(MEDIUM))
    proxy.response_delay_s = 0.006
    assert (await store.local_path(digest(MEDIUM))).read_bytes() == MEDIUM


async def test_corrupt_bytes_are_not_cached(s3_url: str, bucket: Bucket, tmp_path: Path) -> None:
    await publish_two_versions(s3_url)
    await bucket.write(key(s3_url, f"{digest(WEIGHTS)}.safetensors"), WEIGHTS[::-1])
    with pytest.raises(StoreCorrupt, match="its bytes have digest"):
        await open_s3_store(s3_url, cache=tmp_path).local_path(digest(WEIGHTS))
    assert not cached_files(tmp_path)


# --- the cache --------------------------------------------------------------------------------------


async def test_a_cached_artifact_is_available_without_the_s3(far_url: str, proxy: FaultyProxy) -> None:
    await (await publish_two_versions(far_url)).local_path(digest(WEIGHTS))
    proxy.close()
    assert (await open_s3_store(far_url).local_path(digest(WEIGHTS))).read_bytes() == WEIGHTS


async def test_a_cached_file_that_was_changed_is_fetched_again(s3_url: str) -> None:
    path = await (await publish_two_versions(s3_url)).local_path(digest(WEIGHTS))
    path.write_bytes(b"changed")
    assert (await open_s3_store(s3_url).local_path(digest(WEIGHTS))).read_bytes() == WEIGHTS


@pytest.mark.usefixtures("small_parts")
async def test_concurrent_readers_download_once(far_url: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    await store.put(MEDIUM, digest(MEDIUM))
    proxy.response_byte_count = 0
    readers = [open_s3_store(far_url, cache=tmp_path) for _ in range(4)]
    paths = await asyncio.gather(*(reader.local_path(digest(MEDIUM)) for reader in readers))
    assert len(set(paths)) == 1
    assert proxy.response_byte_count < 1.5 * len(MEDIUM)


async def test_a_cached_file_in_use_is_not_evicted(tmp_path: Path) -> None:
    contents = [os.urandom(1000) for _ in range(6)]
    user, other = (ArtifactCache(tmp_path, max_bytes=2500) for _ in range(2))

    async def read(cache: ArtifactCache, content: bytes) -> Path:
        async def fetch(part: DownloadSink) -> None:
            await part.add(content)

        return await cache.path_of(digest(content), fetch)

    path = await read(user, contents[0])
    for content in contents[1:]:
        await read(other, content)
    assert path.exists()
    other.close()
    await read(other, os.urandom(1000))
    assert path.exists()
    assert sum(file.stat().st_size for file in cached_files(tmp_path)) <= 2500


# --- an S3 without conditional puts ---------------------------------------------------------------


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


async def test_a_lock_that_is_not_released_is_unavailable(
    s3_url: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lock.hold_lock(bucket, key(s3_url, "lock/")):
        monkeypatch.setattr(lock, "MAX_WAIT_S", 0.3)
        with pytest.raises(StoreUnavailable, match=r"the lock was not free within 0\.3 s"):
            async with lock.hold_lock(Bucket(BucketAddress.parse(s3_url)), key(s3_url, "lock/")):
                pytest.fail("two at once")


async def test_every_error_is_one_line(s3_url: str) -> None:
    errors: list[StoreError] = []
    for attempt in (open_s3_store(s3_url).read_latest(), open_s3_store(s3_url).publish(manifest(1))):
        try:
            await attempt
        except StoreError as error:
            errors.append(error)
    assert len(errors) == 2
    assert not any("\n" in str(error) for error in errors)
