"""A model repository in S3: its address, and the faults of its content, with a real SeaweedFS."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.model_versions import WEIGHTS, champion, digest, manifest
from support.s3_models import key, open_s3_store, publish_two_versions
from support.s3_server import FaultyProxy

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.stores.errors import StoreCorrupt, StoreError, StoreUnavailable
from fedbus.stores.models.open import UnknownStore, open_model_store
from fedbus.stores.s3.bucket import Bucket, BucketAddress


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


async def test_a_listing_of_artifacts_is_one_request(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url)
    await store.prepare()
    contents = [b"weights %d" % number for number in range(12)]
    for content in contents:
        await store.put(content, digest(content))
    proxy.request_bytes.clear()
    assert await store.list_artifacts() == {digest(content) for content in contents}
    assert proxy.request_bytes.count(b"HTTP/1.1\r\n") == 1


async def test_every_error_is_one_line(s3_url: str) -> None:
    errors: list[StoreError] = []
    for attempt in (open_s3_store(s3_url).read_latest(), open_s3_store(s3_url).publish(manifest(1))):
        try:
            await attempt
        except StoreError as error:
            errors.append(error)
    assert len(errors) == 2
    assert not any("\n" in str(error) for error in errors)
