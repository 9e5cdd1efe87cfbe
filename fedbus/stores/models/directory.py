"""An object store in a directory, on one machine or shared between machines whose file system supports locks and links.

An artifact is hashed before it is used: once in each process, for as long as its file does not change.
"""

import asyncio
import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Final, ParamSpec, Self, TypeVar

from fedbus.common.filesystem import SHARED_MODE, TEMPORARY_FILES, atomic_write, publish_file, temporary_file
from fedbus.contracts.identifiers import TaskId
from fedbus.stores.errors import StoreCorrupt, StoreUnavailable
from fedbus.stores.models.object_store import (
    ABSENT,
    MARKER,
    DownloadSink,
    HashedSource,
    ObjectContent,
    ObjectInfo,
    artifact_key,
)

_PIECE_BYTES: Final = 1024 * 1024
_STALE_PART_S: Final = 3600.0

P = ParamSpec("P")
T = TypeVar("T")


class DirectoryObjectStore:
    """The objects of *task* in the directory *root*: one file each, the key is its relative path."""

    def __init__(self, root: Path, task: TaskId) -> None:
        self.url = str(root)
        self._home = root / task

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:  # noqa: ARG003 (a directory answers at once)
        return cls(_root(url), task)

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:  # noqa: ARG003 - of the port
        markers = await asyncio.to_thread(lambda: list(_root(url).glob(f"*/{MARKER}")))
        return sorted(marker.parent.name for marker in markers)

    def place(self, key: str = "") -> str:
        return str(self._home / key)

    def session(self) -> AbstractAsyncContextManager[object]:
        return nullcontext()

    async def prepare(self) -> None:
        await self._in_thread(self._prepare)

    async def get(self, key: str) -> ObjectContent | None:
        return await self._in_thread(self._get, key)

    async def put(self, key: str, content: bytes, *, tag: str | None = None) -> bool:
        return await self._in_thread(self._put, key, content, tag)

    async def delete(self, key: str) -> None:
        await self._in_thread((self._home / key).unlink, missing_ok=True)

    async def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        return await self._in_thread(lambda: list(self._list(prefix)))

    async def put_artifact(self, artifact: HashedSource) -> str:
        return await self._in_thread(self._put_artifact, artifact)

    async def artifact_size(self, sha256: str) -> int | None:
        path = await self.artifact_file(sha256)
        return None if path is None else (await self._in_thread(path.stat)).st_size

    async def artifact_file(self, sha256: str) -> Path | None:
        return await self._in_thread(self._verified_file, sha256)

    async def read_artifact(self, sha256: str, sink: DownloadSink) -> bool:
        path = self._home / artifact_key(sha256)
        if not await self._in_thread(path.is_file):
            return False
        with await self._in_thread(path.open, "rb") as file:
            while piece := await self._in_thread(file.read, _PIECE_BYTES):
                await sink.add(piece)
        return True

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def work_or_raise() -> T:
            try:
                return work(*args, **kwargs)
            except OSError as error:
                raise StoreUnavailable(Path(error.filename or self._home), error) from error

        return await asyncio.to_thread(work_or_raise)

    def _prepare(self) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        for part in self._home.rglob(TEMPORARY_FILES):
            if time.time() - part.stat().st_mtime > _STALE_PART_S:
                part.unlink(missing_ok=True)

    def _get(self, key: str) -> ObjectContent | None:
        try:
            content = (self._home / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ObjectContent(content, hashlib.sha256(content).hexdigest())

    def _put(self, key: str, content: bytes, tag: str | None) -> bool:
        path = self._home / key
        if path.parent != self._home:
            path.parent.mkdir(
                exist_ok=True
            )  # never the home: that may be the mount point of a missing volume
        if tag is None:
            atomic_write(path, content, mode=SHARED_MODE)
            return True
        with self._lock():
            present = self._get(key)
            if (present.tag if present else ABSENT) != tag:
                return False
            try:
                atomic_write(path, content, mode=SHARED_MODE, overwrite=tag != ABSENT)
            except FileExistsError:  # on a file system that ignores locks
                return False
        return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclude other processes from conditional puts."""
        with (self._home / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._home / prefix.rpartition("/")[0]
        for path in folder.rglob("*"):
            key = path.relative_to(self._home)
            if not key.as_posix().startswith(prefix) or any(part.startswith(".") for part in key.parts):
                continue
            with suppress(FileNotFoundError):  # removed since the listing
                if path.is_file():
                    status = path.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, UTC)
                    yield ObjectInfo(key.as_posix(), status.st_size, modified)

    def _put_artifact(self, artifact: HashedSource) -> str:
        with temporary_file(self._home / "artifact", mode=SHARED_MODE) as part:
            with part.open("r+b") as file:
                for piece in artifact.pieces(_PIECE_BYTES):
                    file.write(piece)
            publish_file(part, self._home / artifact_key(artifact.sha256))
        return artifact.sha256

    def _verified_file(self, sha256: str) -> Path | None:
        path = self._home / artifact_key(sha256)
        if not path.is_file():
            return None
        if (actual := _cached_digest(path, _file_identity(path))) != sha256:
            raise StoreCorrupt(path, f"its bytes have digest {actual}")
        return path


def _root(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _file_identity(path: Path) -> tuple[int, ...]:
    """Return values that change when the file is written to or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(4096)
def _cached_digest(path: Path, _: tuple[int, ...]) -> str:
    """Compute the digest of the file with this identity, once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
