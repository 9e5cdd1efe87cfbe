"""Atomic file writes: a reader sees the old content or the new content, never a part of it.

The content goes to a temporary file in the same directory, which then takes the name of the target. The temporary
file is named ``.<name>.<random>.part``; after a crash it stays behind.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Final

PRIVATE_MODE: Final = 0o600
SHARED_MODE: Final = 0o644
TEMPORARY_FILES: Final = ".*.part"
"""A glob pattern that matches the temporary files in a directory."""


def atomic_write(
    path: Path,
    content: bytes | str,
    *,
    mode: int = PRIVATE_MODE,
    durable: bool = True,
    overwrite: bool = True,
) -> None:
    """Write *content* to *path*, whole or not at all; text is written as UTF-8.

    Raises FileExistsError where *path* exists and *overwrite* is false; of several writers at once, one succeeds.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_open(path, mode=mode, durable=durable, overwrite=overwrite) as file:
        file.write(data)


@contextmanager
def atomic_open(
    path: Path, *, mode: int = PRIVATE_MODE, durable: bool = True, overwrite: bool = True
) -> Iterator[BufferedRandom]:
    """Open a new binary file that becomes *path* when the block ends without an error."""
    with temporary_file(path, mode=mode) as part:
        with part.open("r+b") as file:
            yield file
        publish_file(part, path, durable=durable, overwrite=overwrite)


@contextmanager
def temporary_file(path: Path, *, mode: int = PRIVATE_MODE) -> Iterator[Path]:
    """Create an empty file next to *path*, for a library that writes to a path; it is removed unless published.

    It has exactly *mode*, whatever the umask, from its first byte on.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        os.fchmod(descriptor, mode)
        os.close(descriptor)
        yield part
    finally:
        part.unlink(missing_ok=True)


def publish_file(part: Path, path: Path, *, durable: bool = True, overwrite: bool = True) -> None:
    """Give the complete file *part* the name *path*.

    *durable*: when this returns, content and name are on disk. Raises FileExistsError as `atomic_write` does.
    """
    if durable:
        _sync(part)
    if overwrite:
        part.replace(path)
    else:
        os.link(part, path)
        part.unlink()
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
