"""What is offered: buffers in memory, or a file. Neither is ever copied or read as a whole."""

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeAlias

from fedbus.bus.blobs.threads import run_in_thread

BytesLike: TypeAlias = bytes | bytearray | memoryview
BlobData: TypeAlias = BytesLike | Sequence[BytesLike] | Path

_BLOCK_BYTES = 1024**2


class BlobGone(Exception):
    """The bytes that were offered are no longer there."""


class BlobSource(Protocol):
    size_bytes: int

    async def read(self, start: int, end: int) -> BytesLike:
        """The bytes from *start* up to *end*; raises Gone."""

    def blocks(self) -> Iterator[BytesLike]:
        """All of it, in pieces, in order. Blocks: for a thread."""

    def close(self) -> None: ...


def open_source(data: BlobData) -> BlobSource:
    """*data* as something to be read in pieces. Opens a file, so: for a thread."""
    match data:
        case Path():
            return _FileSource(data)
        case bytes() | bytearray() | memoryview():
            return _BufferSource([data])
        case _:
            return _BufferSource(data)


def compute_digest(content: BlobSource) -> str:
    """Blocks: for a thread."""
    digest = hashlib.sha256()
    for block in content.blocks():
        digest.update(block)
    return digest.hexdigest()


class _BufferSource:
    """Buffers one after the other, as if they were one. They must not change while they are offered."""

    def __init__(self, buffers: Sequence[BytesLike]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.size_bytes = self._ends[-1] if self._ends else 0

    async def read(self, start: int, end: int) -> BytesLike:
        pieces = list(self._pieces(start, end))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def blocks(self) -> Iterator[BytesLike]:
        return iter(self._views)

    def close(self) -> None:
        self._views, self._ends = [], []

    def _pieces(self, start: int, end: int) -> Iterator[memoryview]:
        number = bisect_right(self._ends, start)
        while start < end:
            if number == len(self._views):
                raise BlobGone
            view, view_end = self._views[number], self._ends[number]
            offset = start - (view_end - len(view))
            yield view[offset : offset + end - start]
            start, number = view_end, number + 1


class _FileSource:
    """A file, opened once: what was offered stays the same when the path gets another file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._closing = threading.Lock()  # a descriptor closed under a read may already be another file's
        self.size_bytes = os.fstat(self._file.fileno()).st_size

    async def read(self, start: int, end: int) -> BytesLike:
        return await run_in_thread(self._read, start, end)

    def blocks(self) -> Iterator[BytesLike]:
        for start in range(0, self.size_bytes, _BLOCK_BYTES):
            yield self._read(start, min(start + _BLOCK_BYTES, self.size_bytes))

    def close(self) -> None:
        with self._closing:
            self._file.close()

    def _read(self, start: int, end: int) -> bytes:
        with self._closing:
            if self._file.closed:
                raise BlobGone
            block = os.pread(self._file.fileno(), end - start, start)
        if len(block) != end - start:
            raise BlobGone
        return block
