"""A model repository in S3, for tests of its faults."""

import os
from pathlib import Path

from fedbus.contracts.identifiers import TaskId
from fedbus.stores.models.artifact_cache import ArtifactCache
from fedbus.stores.models.open import ModelRepository
from fedbus.stores.models.s3 import S3ObjectStore
from fedbus.stores.s3.bucket import PART_BYTES, BucketAddress
from support.model_versions import WEIGHTS, digest, manifest

MNIST = TaskId("mnist")

LARGE = os.urandom(2 * PART_BYTES + 12345)
"""An artifact that is uploaded in three parts."""

MIN_PART_BYTES = 5 * 1024**2
"""The limit of S3 for a part that is not the last."""

MEDIUM = LARGE[: MIN_PART_BYTES + 12345]
"""An artifact that is uploaded in two such parts."""


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
