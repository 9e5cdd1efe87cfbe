"""Sources: what is offered, as buffers in memory or as a file. Neither is copied or read as a whole."""

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
    """The offered bytes no longer exist."""


class BlobSource(Protocol):
    size_bytes: int

    async def read(self, start: int, end: int) -> BytesLike:
        """Return the bytes from *start* up to *end*; raises BlobGone."""

    def iter_blocks(self) -> Iterator[BytesLike]:
        """Yield the whole content in pieces, in order. Blocking: call it in a thread."""

    def close(self) -> None: ...


def open_source(data: BlobData) -> BlobSource:
    """Open *data* as a source. Opens a file: call it in a thread."""
    match data:
        case Path():
            return _FileSource(data)
        case bytes() | bytearray() | memoryview():
            return _BufferSource([data])
        case _:
            return _BufferSource(data)


def compute_digest(content: BlobSource) -> str:
    """Compute the SHA-256 digest. Blocking: call it in a thread."""
    digest = hashlib.sha256()
    for block in content.iter_blocks():
        digest.update(block)
    return digest.hexdigest()


class _BufferSource:
    """Concatenated buffers, which must not change while they are offered."""

    def __init__(self, buffers: Sequence[BytesLike]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.size_bytes = self._ends[-1] if self._ends else 0

    async def read(self, start: int, end: int) -> BytesLike:
        pieces = list(self._pieces(start, end))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def iter_blocks(self) -> Iterator[BytesLike]:
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
    """A file that is opened once, so that replacing the path does not change the offered content."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._closing = (
            threading.Lock()
        )  # a descriptor closed during a read may already belong to another file
        self.size_bytes = os.fstat(self._file.fileno()).st_size

    async def read(self, start: int, end: int) -> BytesLike:
        return await run_in_thread(self._read, start, end)

    def iter_blocks(self) -> Iterator[BytesLike]:
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
