"""The cache of artifacts on disk, below a store in S3."""

import asyncio
import os
from pathlib import Path

import pytest
from support.model_versions import WEIGHTS, digest
from support.s3_models import MEDIUM, cached_files, key, open_s3_store, publish_two_versions
from support.s3_server import FaultyProxy

from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.artifact_cache import ArtifactCache
from fedbus.stores.models.object_store import DownloadSink
from fedbus.stores.s3.bucket import Bucket


async def test_corrupt_bytes_are_not_cached(s3_url: str, bucket: Bucket, tmp_path: Path) -> None:
    await publish_two_versions(s3_url)
    await bucket.write(key(s3_url, f"{digest(WEIGHTS)}.safetensors"), WEIGHTS[::-1])
    with pytest.raises(StoreCorrupt, match="its bytes have digest"):
        await open_s3_store(s3_url, cache=tmp_path).local_path(digest(WEIGHTS))
    assert not cached_files(tmp_path)


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
