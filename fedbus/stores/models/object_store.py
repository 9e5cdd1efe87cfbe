"""The object store under a model repository: small objects by key, and artifacts that are streamed in and out.

A backend is one class that implements `ObjectStore`, registered as an entry point of the group ``fedbus.model_stores``
under the scheme of its URLs:

    [project.entry-points."fedbus.model_stores"]
    gs = "my_package:GoogleObjectStore"

Versions, the champion pointer and retirement are written once, in `fedbus.stores.models.repository`. What they need
of a backend is that a reader sees a written object at once, and that a conditional `ObjectStore.put` is atomic.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol, Self

from fedbus.contracts.identifiers import TaskId
from fedbus.stores.models.interface import DigestMismatch
from fedbus.stores.models.source import Buffer, Source, iter_parts, iter_pieces, source_size_bytes

MARKER: Final = "fedbus-models.json"
"""The key of the object that marks a folder as a model repository."""
ARTIFACT_SUFFIX: Final = ".safetensors"
ABSENT: Final = ""
"""The tag of an object that does not exist."""
_PIECE_BYTES: Final = 1024**2


@dataclass(frozen=True)
class ObjectContent:
    """A small object and its tag, which changes whenever the content does."""

    content: bytes
    tag: str


@dataclass(frozen=True)
class ObjectInfo:
    """An entry of a listing."""

    key: str
    size_bytes: int
    modified: datetime


class DownloadSink(Protocol):
    """Takes a download piece by piece; after a broken connection the download continues at `size_bytes`."""

    size_bytes: int

    async def add(self, piece: bytes) -> None:
        """Take the next piece. Raises StoreError."""


class HashedSource:
    """An artifact to be stored, hashed while it is read; *expected* is its SHA-256, if the caller knows it."""

    def __init__(self, source: Source, expected: str | None = None) -> None:
        self._source = source
        self._expected = expected
        self._actual: str | None = None

    @property
    def size_bytes(self) -> int:
        return source_size_bytes(self._source)

    @property
    def sha256(self) -> str:
        """The digest. If the caller gave none and nothing has read all pieces yet, this reads them."""
        if self._expected is None and self._actual is None:
            self.check()
        return self._expected or self._actual or ""

    def check(self) -> None:
        """Read all pieces and drop them. Raises DigestMismatch."""
        for _ in self.pieces():
            pass

    def pieces(self, piece_bytes: int = _PIECE_BYTES) -> Iterator[Buffer]:
        """Yield all bytes in order, at most *piece_bytes* at a time. Raises DigestMismatch after the last piece."""
        return self._hash(iter_pieces(self._source, piece_bytes))

    def parts(self, part_bytes: int) -> Iterator[bytes]:
        """Yield all bytes in parts of exactly *part_bytes* except the last. Raises DigestMismatch at the end."""
        yield from self._hash(iter_parts(self._source, part_bytes))  # type: ignore[misc]  # bytes in, bytes out

    def _hash(self, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            yield piece
        self._actual = digest.hexdigest()
        if self._expected not in (None, self._actual):
            raise DigestMismatch(str(self._expected), self._actual)


def artifact_key(sha256: str) -> str:
    return f"{sha256}{ARTIFACT_SUFFIX}"


class ObjectStore(Protocol):
    """The objects of one task. Keys are relative to the task's folder: ``latest``, ``versions/3.json``.

    Every method raises StoreUnavailable after it has retried for the patience of the store, and StoreDenied at once.
    """

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:
        """Open the store at *url*, without I/O. Raises UnknownStore if *url* is invalid.

        *patience_s* is the time for which a call without progress is retried.
        """

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:
        """Return the names of the folders at *url* that hold a `MARKER`, sorted."""

    @property
    def url(self) -> str:
        """The URL that opens this store in another process."""

    def place(self, key: str = "") -> str:
        """Return the location of *key* for error messages, without secrets."""

    def session(self) -> AbstractAsyncContextManager[object]:
        """Keep connections open for several calls."""

    async def prepare(self) -> None:
        """Make what the store needs before its first object, and remove what writers that died left behind."""

    # --- small objects ---

    async def get(self, key: str) -> ObjectContent | None:
        """Read a small object; None if there is none."""

    async def put(self, key: str, content: bytes, *, tag: str | None = None) -> bool:
        """Write a small object completely or not at all. Returns whether it was written.

        With *tag*, only if the object has this tag now (`ABSENT`: if there is none). Of several writers at once, in
        any number of processes, exactly one succeeds.
        """

    async def delete(self, key: str) -> None:
        """Delete an object; it is no error if there is none."""

    async def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """List all objects whose keys begin with *prefix*, except unfinished ones."""

    # --- artifacts, under `artifact_key` ---

    async def put_artifact(self, artifact: HashedSource) -> str:
        """Store *artifact* durably, completely or not at all. Returns its digest. Raises DigestMismatch."""

    async def artifact_size(self, sha256: str) -> int | None:
        """Return the size in bytes; None if there is no such artifact.

        A store that reads artifacts without a transfer also verifies the digest and raises StoreCorrupt.
        """

    async def artifact_file(self, sha256: str) -> Path | None:
        """Return a verified, read-only local file with the artifact; None if there is none. Raises StoreCorrupt."""

    async def read_artifact(self, sha256: str, sink: DownloadSink) -> bool:
        """Read the stored bytes, not a local copy, into *sink*; False if there is no such artifact."""
