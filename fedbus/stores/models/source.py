"""The bytes of an artifact to be stored: a file, a buffer, or a sequence of buffers, read in pieces.

A sequence of buffers is not joined: that would put one more model into memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Source: TypeAlias = Path | Buffer | Sequence[Buffer]


def source_size_bytes(source: Source) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    return sum(memoryview(buffer).nbytes for buffer in _as_buffers(source))


def iter_pieces(source: Source, piece_bytes: int) -> Iterator[Buffer]:
    """Yield all bytes of *source* in order, at most *piece_bytes* at a time; only a file is copied."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            while piece := file.read(piece_bytes):
                yield piece
        return
    for buffer in _as_buffers(source):
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), piece_bytes):
            yield view[start : start + piece_bytes]


def iter_parts(source: Source, part_bytes: int) -> Iterator[bytes]:
    """Yield all bytes of *source* in parts of exactly *part_bytes*, except the last."""
    buffer = bytearray()
    for piece in iter_pieces(source, part_bytes):
        buffer += piece
        while len(buffer) >= part_bytes:
            yield bytes(buffer[:part_bytes])
            del buffer[:part_bytes]
    if buffer:
        yield bytes(buffer)


def _as_buffers(source: Buffer | Sequence[Buffer]) -> Sequence[Buffer]:
    return [source] if isinstance(source, bytes | bytearray | memoryview) else source
