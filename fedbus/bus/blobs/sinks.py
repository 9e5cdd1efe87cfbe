"""Where a blob is put, chunk after chunk, in order, with its digest taken on the way.

What blocks is done in threads; a chunk so small that the thread would cost more is not.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy

from fedbus.bus.blobs.errors import BlobCorrupt
from fedbus.bus.blobs.threads import open_in_thread, run_in_thread
from fedbus.contracts.model import BlobRef

INLINE_BYTES = 64 * 1024
"""Hashed on the loop in 40 µs, which is less than a thread takes to begin."""
_BLOCK_BYTES = 1024**2


class BlobSink(Protocol):
    held_bytes: int
    """What was there before: whole chunks from the left."""

    async def put(self, chunks: Sequence[bytes]) -> None:
        """Take the next *chunks*."""

    async def finish(self) -> None:
        """All is there; raises BlobCorrupt where it is not what the reference says."""


class MemorySink:
    """Into a buffer: the caller's, or a new one."""

    held_bytes = 0

    def __init__(self, ref: BlobRef, into: memoryview | None) -> None:
        self._ref = ref
        self._digest = hashlib.sha256()
        self._end = 0
        self.view = (_allocate(ref.size_bytes) if into is None else _as_bytes(into))[: ref.size_bytes]
        if self.view.readonly or len(self.view) < ref.size_bytes:
            raise ValueError(f"the buffer must be writable and have {ref.size_bytes} bytes")

    async def put(self, chunks: Sequence[bytes]) -> None:
        if sum(map(len, chunks)) <= INLINE_BYTES:
            self._put(chunks)
        else:
            await run_in_thread(self._put, chunks)

    async def finish(self) -> None:
        _check_digest(self._ref, self._digest.hexdigest())

    def _put(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            start, self._end = self._end, self._end + len(chunk)
            self.view[start : self._end] = chunk
            self._digest.update(chunk)


class FileSink:
    """Into a file beside *path*, which holds a beginning of the blob and never a gap: after a
    crash, what is in it is gone on from. It becomes *path* when the digest is right.
    """

    def __init__(self, ref: BlobRef, path: Path, part: Path, file: FileIO) -> None:
        self._ref = ref
        self._path = path
        self._part = part
        self._file = file
        self._digest = hashlib.sha256()
        self.held_bytes = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, ref: BlobRef, path: Path) -> AsyncIterator["FileSink"]:
        part, file = await open_in_thread(lambda: _open_part(ref, path), lambda opened: opened[1].close())
        sink = cls(ref, path, part, file)
        try:
            await run_in_thread(sink._resume)
            yield sink
        finally:
            file.close()

    async def put(self, chunks: Sequence[bytes]) -> None:
        await run_in_thread(self._put, chunks)

    async def finish(self) -> None:
        await run_in_thread(self._finish)

    async def discard(self) -> None:
        """Keep nothing of it."""
        await run_in_thread(self._part.unlink, missing_ok=True)

    def _resume(self) -> None:
        """Keep the whole chunks that are there, and take their digest anew."""
        there = min(os.fstat(self._file.fileno()).st_size, self._ref.size_bytes)
        whole = there if there == self._ref.size_bytes else there - there % self._ref.chunk_bytes
        self._file.truncate(whole)
        while (left := whole - self._file.tell()) > 0:
            self._digest.update(self._file.read(min(left, _BLOCK_BYTES)))
        self.held_bytes = whole

    def _put(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]
            self._digest.update(chunk)

    def _finish(self) -> None:
        _check_digest(self._ref, self._digest.hexdigest())
        os.fsync(self._file.fileno())
        self._part.replace(self._path)
        _sync_directory(self._path.parent)


def _check_digest(ref: BlobRef, digest: str) -> None:
    if digest != ref.sha256:
        raise BlobCorrupt(ref, f"its sha256 is {digest[:12]}…")


def _allocate(size_bytes: int) -> memoryview:
    """Memory that is touched for the first time when a chunk is put there, and not before."""
    return numpy.empty(size_bytes, dtype=numpy.uint8).data.cast("B")


def _as_bytes(buffer: memoryview) -> memoryview:
    return buffer.cast("B") if buffer.nbytes else memoryview(bytearray())


def _open_part(ref: BlobRef, path: Path) -> tuple[Path, FileIO]:
    """The part of *path* that an earlier fetch has left, or a new one. It is locked: of two fetches
    at once, the second begins a part of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{ref.sha256[:16]}.part")
    while True:
        file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            part = part.with_name(f"{part.name}.{secrets.token_hex(4)}")
        else:
            if _is_current(part, file):  # or it was renamed between the opening and the lock
                return part, file
        file.close()


def _is_current(part: Path, file: FileIO) -> bool:
    try:
        return part.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
