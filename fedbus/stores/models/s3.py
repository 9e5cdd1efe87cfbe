"""An object store in a bucket of any S3, under ``<prefix>/<task>/``. It needs the extra ``fedbus[s3]``.

Conditional puts are tested once per process, before the first one. If the S3 does not support them, a lock in the
bucket replaces them, with a warning in the log (see `fedbus.stores.s3.lock`).

Artifacts are streamed both ways. A broken download continues where it ended, is verified, and stays in a cache that
the processes of this machine share (see `fedbus.stores.models.artifact_cache`).
"""

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Self

import structlog

from fedbus.contracts.identifiers import TaskId
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.artifact_cache import ArtifactCache, PartialDownload
from fedbus.stores.models.interface import DigestMismatch
from fedbus.stores.models.object_store import (
    ABSENT,
    MARKER,
    DownloadSink,
    HashedSource,
    ObjectContent,
    ObjectInfo,
    artifact_key,
)
from fedbus.stores.s3.bucket import MAX_PARTS, PART_BYTES, Bucket, BucketAddress, ConditionalPutsUnsupported
from fedbus.stores.s3.lock import hold_lock

log = structlog.get_logger("fedbus.model_store")


class S3ObjectStore:
    """The objects of *task* in the bucket at *address*."""

    def __init__(
        self, address: BucketAddress, task: TaskId, *, patience_s: float, cache: ArtifactCache | None = None
    ) -> None:
        self.url = address.url
        self._bucket = Bucket(address, patience_s=patience_s)
        self._home = f"{address.prefix}/{task}" if address.prefix else str(task)
        self._cache = cache or ArtifactCache((address.cache or _default_cache()) / task)
        self._has_conditional_puts: bool | None = None
        self._uploaded: set[str] = set()
        """Artifacts that this process has uploaded completely. Others may be corrupt, so they are uploaded again."""

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:
        return cls(BucketAddress.parse(url), task, patience_s=patience_s)

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:
        address = BucketAddress.parse(url)
        bucket = Bucket(address, patience_s=patience_s)
        prefix = f"{address.prefix}/" if address.prefix else ""
        async with bucket.open():
            folders = await bucket.list_folders(prefix)
            marker_sizes = await asyncio.gather(
                *(bucket.read_size(f"{folder}{MARKER}") for folder in folders)
            )
        names = [folder.removeprefix(prefix).strip("/") for folder in folders]
        return sorted(name for name, size in zip(names, marker_sizes, strict=True) if size is not None)

    def place(self, key: str = "") -> str:
        return f"{self._bucket.address}, {self._key(key)}"

    def session(self) -> AbstractAsyncContextManager[object]:
        return self._bucket.open()

    async def prepare(self) -> None:
        pass  # a bucket has no directories

    # --- small objects ---

    async def get(self, key: str) -> ObjectContent | None:
        return await self._bucket.read(self._key(key))

    async def put(self, key: str, content: bytes, *, tag: str | None = None) -> bool:
        if tag is None:
            await self._bucket.write(self._key(key), content)
            return True
        async with self.session():
            if await self._check_conditional_puts():
                if tag == ABSENT:
                    return await self._bucket.create(self._key(key), content)
                return await self._bucket.replace(self._key(key), content, tag)
            async with hold_lock(self._bucket, self._key("lock/")):
                present = await self.get(key)
                if (present.tag if present else ABSENT) != tag:
                    return False
                await self._bucket.write(self._key(key), content)
                return True

    async def delete(self, key: str) -> None:
        await self._bucket.delete(self._key(key))

    async def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        objects = await self._bucket.list_objects(self._key(prefix))
        home = self._key("")
        return [ObjectInfo(info.key.removeprefix(home), info.size_bytes, info.modified) for info in objects]

    async def _check_conditional_puts(self) -> bool:
        if self._has_conditional_puts is None:
            self._has_conditional_puts = await self._probe_conditional_puts()
            if not self._has_conditional_puts:
                log.warning(
                    "S3 does not support conditional puts; using a lock object",
                    store=str(self._bucket.address),
                )
        return self._has_conditional_puts

    async def _probe_conditional_puts(self) -> bool:
        """Return whether a conditional put that must fail does fail."""
        key = self._key(f"trial/{os.urandom(8).hex()}")
        try:
            await self._bucket.create(key, b"1")
            return not (
                await self._bucket.create(key, b"2") or await self._bucket.replace(key, b"3", f'"{"0" * 32}"')
            )
        except ConditionalPutsUnsupported:
            return False
        finally:
            await self._bucket.delete(key)

    # --- artifacts ---

    async def put_artifact(self, artifact: HashedSource) -> str:
        size = await asyncio.to_thread(lambda: artifact.size_bytes)
        sha256 = await asyncio.to_thread(lambda: artifact.sha256)  # the key must be known before the upload
        key = self._key(artifact_key(sha256))
        async with self.session():
            if sha256 in self._uploaded and await self._bucket.read_size(key) == size:
                await asyncio.to_thread(artifact.check)
                return sha256
            parts = artifact.parts(max(PART_BYTES, -(-size // MAX_PARTS)))
            if size > PART_BYTES:
                await self._bucket.upload(key, size, parts)
            else:
                await self._bucket.write(key, await asyncio.to_thread(b"".join, parts))
        self._uploaded.add(sha256)
        return sha256

    async def artifact_size(self, sha256: str) -> int | None:
        return await self._bucket.read_size(self._key(artifact_key(sha256)))

    async def artifact_file(self, sha256: str) -> Path | None:
        async def fetch(part: PartialDownload) -> None:
            if not await self.read_artifact(sha256, part):
                raise _Absent
            if part.digest != sha256:  # the part of an earlier download may be corrupt, so restart
                part.restart()
                await self.read_artifact(sha256, part)

        try:
            return await self._cache.path_of(sha256, fetch)
        except _Absent:
            return None
        except DigestMismatch as mismatch:
            raise StoreCorrupt(
                self.place(artifact_key(sha256)), f"its bytes have digest {mismatch.actual}"
            ) from None

    async def read_artifact(self, sha256: str, sink: DownloadSink) -> bool:
        return await self._bucket.download(self._key(artifact_key(sha256)), sink)

    def _key(self, key: str) -> str:
        return f"{self._home}/{key}"


class _Absent(Exception):
    """The bucket holds no such artifact."""


def _default_cache() -> Path:
    return Path(os.environ.get("FEDBUS_HOME") or ".fedbus").expanduser().absolute() / "cache" / "models"
