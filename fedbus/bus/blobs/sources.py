"""What is offered: buffers in memory, or a file. Neither is ever copied or read as a whole."""

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeAlias

from fedbus.bus.blobs.threads import in_thread

Bytes: TypeAlias = bytes | bytearray | memoryview
Data: TypeAlias = Bytes | Sequence[Bytes] | Path

_BLOCK_BYTES = 1024**2


class Gone(Exception):
    """The bytes that were offered are no longer there."""


class Content(Protocol):
    size_bytes: int

    async def read(self, start: int, end: int) -> Bytes:
        """The bytes from *start* up to *end*; raises Gone."""

    def blocks(self) -> Iterator[Bytes]:
        """All of it, in pieces, in order. Blocks: for a thread."""

    def close(self) -> None: ...


def content_of(data: Data) -> Content:
    """*data* as something to be read in pieces. Opens a file, so: for a thread."""
    match data:
        case Path():
            return _File(data)
        case bytes() | bytearray() | memoryview():
            return _Buffers([data])
        case _:
            return _Buffers(data)


def digest_of(content: Content) -> str:
    """Blocks: for a thread."""
    digest = hashlib.sha256()
    for block in content.blocks():
        digest.update(block)
    return digest.hexdigest()


class _Buffers:
    """Buffers one after the other, as if they were one. They must not change while they are offered."""

    def __init__(self, buffers: Sequence[Bytes]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.size_bytes = self._ends[-1] if self._ends else 0

    async def read(self, start: int, end: int) -> Bytes:
        pieces = list(self._pieces(start, end))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def blocks(self) -> Iterator[Bytes]:
        return iter(self._views)

    def close(self) -> None:
        self._views, self._ends = [], []

    def _pieces(self, start: int, end: int) -> Iterator[memoryview]:
        number = bisect_right(self._ends, start)
        while start < end:
            if number == len(self._views):
                raise Gone
            view, view_end = self._views[number], self._ends[number]
            offset = start - (view_end - len(view))
            yield view[offset : offset + end - start]
            start, number = view_end, number + 1


class _File:
    """A file, opened once: what was offered stays the same when the path gets another file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._closing = threading.Lock()  # a descriptor closed under a read may already be another file's
        self.size_bytes = os.fstat(self._file.fileno()).st_size

    async def read(self, start: int, end: int) -> Bytes:
        return await in_thread(self._read, start, end)

    def blocks(self) -> Iterator[Bytes]:
        for start in range(0, self.size_bytes, _BLOCK_BYTES):
            yield self._read(start, min(start + _BLOCK_BYTES, self.size_bytes))

    def close(self) -> None:
        with self._closing:
            self._file.close()

    def _read(self, start: int, end: int) -> bytes:
        with self._closing:
            if self._file.closed:
                raise Gone
            block = os.pread(self._file.fileno(), end - start, start)
        if len(block) != end - start:
            raise Gone
        return block
