"""Uploads and downloads of artifacts over a faulty network, to a real SeaweedFS behind a proxy."""

import asyncio
from pathlib import Path

import pytest
from support import eventually
from support.model_versions import WEIGHTS, digest, manifest
from support.s3_models import LARGE, MEDIUM, cached_files, key, open_s3_store, publish_two_versions
from support.s3_server import FaultyProxy

from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.models.open import ArtifactMissing, DigestMismatch
from fedbus.stores.s3.bucket import Bucket


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


@pytest.mark.usefixtures("small_parts")
async def test_a_slow_download_does_not_time_out(far_url: str, proxy: FaultyProxy) -> None:
    store = open_s3_store(far_url, patience_s=0.1)
    await store.prepare()
    await store.put(MEDIUM, digest(MEDIUM))
    proxy.response_delay_s = 0.006
    assert (await store.local_path(digest(MEDIUM))).read_bytes() == MEDIUM
