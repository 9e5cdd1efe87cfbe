"""A model repository in memory, for the server side of a simulated fleet."""

import hashlib
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Self

from fedbus.common import clock
from fedbus.contracts.identifiers import TaskId
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.object_store import (
    ABSENT,
    DownloadSink,
    HashedSource,
    ObjectContent,
    ObjectInfo,
    artifact_key,
)
from fedbus.stores.models.repository import ModelRepository


class FleetObjectStore:
    """The objects of one task: *objects*, by key, with the times of their changes; None is an empty store.

    Files that the bus offers are copied to *directory*.
    """

    def __init__(
        self,
        directory: Path,
        *,
        url: str = "memory://fleet",
        objects: dict[str, tuple[bytes, datetime]] | None = None,
    ) -> None:
        self._directory = directory
        self._url = url
        self._objects = {} if objects is None else objects

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:  # noqa: ARG003 - memory answers at once
        return cls(Path(url))

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:  # noqa: ARG003
        return []

    @property
    def url(self) -> str:
        return self._url

    def place(self, key: str = "") -> str:
        return f"{self.url}/{key}"

    def session(self) -> AbstractAsyncContextManager[object]:
        return nullcontext()

    async def prepare(self) -> None: ...

    async def get(self, key: str) -> ObjectContent | None:
        if key not in self._objects:
            return None
        content, _ = self._objects[key]
        return ObjectContent(content, hashlib.sha256(content).hexdigest())

    async def put(self, key: str, content: bytes, *, tag: str | None = None) -> bool:
        present = await self.get(key)
        if tag is not None and tag != (present.tag if present else ABSENT):
            return False
        self._objects[key] = content, clock.now()
        return True

    async def delete(self, key: str) -> None:
        self._objects.pop(key, None)

    async def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        return [
            ObjectInfo(key, len(content), modified)
            for key, (content, modified) in self._objects.items()
            if key.startswith(prefix)
        ]

    async def put_artifact(self, artifact: HashedSource) -> str:
        content = b"".join(artifact.pieces())
        await self.put(artifact_key(artifact.sha256), content)
        return artifact.sha256

    async def artifact_size(self, sha256: str) -> int | None:
        found = await self.get(artifact_key(sha256))
        return len(found.content) if found else None

    async def artifact_file(self, sha256: str) -> Path | None:
        found = await self.get(artifact_key(sha256))
        if found is None:
            return None
        if found.tag != sha256:
            raise StoreCorrupt(self.place(artifact_key(sha256)), f"its bytes have digest {found.tag}")
        path = self._directory / sha256
        path.write_bytes(found.content)
        return path

    async def read_artifact(self, sha256: str, sink: DownloadSink) -> bool:
        found = await self.get(artifact_key(sha256))
        if found is not None:
            await sink.add(found.content)
        return found is not None


def fleet_model_store(directory: Path) -> ModelRepository:
    """Open an empty model repository in memory."""
    objects = FleetObjectStore(directory)
    return ModelRepository(objects, objects)
