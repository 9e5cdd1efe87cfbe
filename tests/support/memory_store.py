"""A backend of the model repository that stores objects in memory. Its URLs are ``memory://<name>``."""

import hashlib
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

from fedbus.contracts.identifiers import TaskId
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.object_store import (
    ABSENT,
    MARKER,
    DownloadSink,
    HashedSource,
    ObjectContent,
    ObjectInfo,
    artifact_key,
)


@dataclass
class MemoryObjectStore:
    """The objects of *task* at *root*."""

    root: str
    task: str
    folders: ClassVar[dict[tuple[str, str], dict[str, tuple[bytes, datetime]]]] = {}
    copies: ClassVar[Path]
    """Where `artifact_file` writes; a test sets it."""

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:  # noqa: ARG003 (memory answers at once)
        return cls(url, task)

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:  # noqa: ARG003
        return sorted(
            task for (root, task), objects in cls.folders.items() if root == url and MARKER in objects
        )

    @property
    def url(self) -> str:
        return self.root

    @property
    def objects(self) -> dict[str, tuple[bytes, datetime]]:
        return self.folders.setdefault((self.root, self.task), {})

    def place(self, key: str = "") -> str:
        return f"{self.root}/{self.task}/{key}"

    def session(self) -> AbstractAsyncContextManager[object]:
        return nullcontext()

    async def prepare(self) -> None: ...

    async def get(self, key: str) -> ObjectContent | None:
        if key not in self.objects:
            return None
        content, _ = self.objects[key]
        return ObjectContent(content, hashlib.sha256(content).hexdigest())

    async def put(self, key: str, content: bytes, *, tag: str | None = None) -> bool:
        present = await self.get(key)
        if tag is not None and tag != (present.tag if present else ABSENT):
            return False
        self.objects[key] = content, datetime.now(UTC)
        return True

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        return [
            ObjectInfo(key, len(content), modified)
            for key, (content, modified) in self.objects.items()
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
        (self.copies / sha256).write_bytes(found.content)
        return self.copies / sha256

    async def read_artifact(self, sha256: str, sink: DownloadSink) -> bool:
        found = await self.get(artifact_key(sha256))
        if found is not None:
            await sink.add(found.content)
        return found is not None
