"""Sinks: where a blob is written, chunk by chunk, in order, while its digest is computed.

Blocking work runs in threads, except for chunks so small that the thread would cost more.
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
from fedbus.common.filesystem import publish_file
from fedbus.contracts.model import BlobRef

INLINE_BYTES = 64 * 1024
"""Hashing this much takes 40 µs on the event loop, less than starting a thread."""
_BLOCK_BYTES = 1024**2


class BlobSink(Protocol):
    resumed_bytes: int
    """The bytes of an earlier fetch that are reused: whole chunks from the beginning."""

    async def put(self, chunks: Sequence[bytes]) -> None:
        """Write the next *chunks*."""

    async def finish(self) -> None:
        """Verify the complete blob; raises BlobCorrupt if it does not match the reference."""


class MemorySink:
    """Writes a blob into memory: the caller's buffer, or a new one."""

    resumed_bytes = 0

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
    """Writes a blob into a part file next to *path*, which replaces *path* after the digest is verified.

    The part file contains a prefix of the blob without gaps, so a fetch can resume after a crash.
    """

    def __init__(self, ref: BlobRef, path: Path, part: Path, file: FileIO) -> None:
        self._ref = ref
        self._path = path
        self._part = part
        self._file = file
        self._digest = hashlib.sha256()
        self.resumed_bytes = 0

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
        """Delete the part file."""
        await run_in_thread(self._part.unlink, missing_ok=True)

    def _resume(self) -> None:
        """Keep the whole chunks in the part file, and compute their digest."""
        size = min(os.fstat(self._file.fileno()).st_size, self._ref.size_bytes)
        reused = size if size == self._ref.size_bytes else size - size % self._ref.chunk_bytes
        self._file.truncate(reused)
        while (remaining := reused - self._file.tell()) > 0:
            self._digest.update(self._file.read(min(remaining, _BLOCK_BYTES)))
        self.resumed_bytes = reused

    def _put(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]
            self._digest.update(chunk)

    def _finish(self) -> None:
        _check_digest(self._ref, self._digest.hexdigest())
        publish_file(self._part, self._path)


def _check_digest(ref: BlobRef, digest: str) -> None:
    if digest != ref.sha256:
        raise BlobCorrupt(ref, f"its SHA-256 digest is {digest[:12]}…")


def _allocate(size_bytes: int) -> memoryview:
    """Allocate memory without touching its pages, so that it is committed only as chunks arrive."""
    return numpy.empty(size_bytes, dtype=numpy.uint8).data.cast("B")


def _as_bytes(buffer: memoryview) -> memoryview:
    return buffer.cast("B") if buffer.nbytes else memoryview(bytearray())


def _open_part(ref: BlobRef, path: Path) -> tuple[Path, FileIO]:
    """Open and lock the part file of an earlier fetch, or a new one; a concurrent fetch gets its own part file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{ref.sha256[:16]}.part")
    while True:
        file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            part = part.with_name(f"{part.name}.{secrets.token_hex(4)}")
        else:
            if _is_current(part, file):  # false if it was renamed between open and lock
                return part, file
        file.close()


def _is_current(part: Path, file: FileIO) -> bool:
    try:
        return part.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
