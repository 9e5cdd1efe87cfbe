"""A local cache of bounded size for the artifacts of a remote store.

    <sha256>.part           a download in progress; it continues here after a break
    <sha256>.safetensors    a complete file, verified before it got this name

The processes of one machine share the cache. The lock on a part lets one process download while the others wait. A
process that uses a file holds a shared lock on it, so that eviction does not remove it. Each process verifies a file
once before it returns it.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from fedbus.common.filesystem import publish_file
from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.models.interface import DigestMismatch

MAX_BYTES: Final = 4 * 1024**3
MAX_LOCKED_FILES: Final = 4
"""The number of files that one cache object keeps locked: those that it returned last."""
STALE_PART_S: Final = 24 * 3600.0
LOCK_POLL_S: Final = 0.1

FetchPart: TypeAlias = "Callable[[PartialDownload], Awaitable[None]]"


class ArtifactCache:
    """The artifacts in *directory*."""

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._locked_files: OrderedDict[str, BinaryIO] = OrderedDict()

    async def path_of(self, sha256: str, fetch: FetchPart) -> Path:
        """Return the file of *sha256*, from the cache or downloaded by *fetch*.

        Raises DigestMismatch, StoreUnavailable and the errors of *fetch*.
        """
        path = self._directory / f"{sha256}.safetensors"
        while not await asyncio.to_thread(self._try_lock, path, sha256):
            await self._download(path, sha256, fetch)
        await asyncio.to_thread(self._evict)
        return path

    def close(self) -> None:
        """Release the locks on the returned files."""
        while self._locked_files:
            self._locked_files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def _try_lock(self, path: Path, sha256: str) -> bool:
        """Lock the file. Returns whether it exists and has the right digest."""
        if sha256 in self._locked_files and path.exists():
            self._locked_files.move_to_end(sha256)
            return True
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)  # an eviction may be about to remove it
        if not _is_file_at(file, path) or not _has_digest(file, sha256):
            with suppress(FileNotFoundError):
                path.unlink()
            file.close()
            return False
        os.utime(path)
        self._remember_lock(sha256, file)
        return True

    def _remember_lock(self, sha256: str, file: BinaryIO) -> None:
        if (previous := self._locked_files.pop(sha256, None)) is not None:
            previous.close()
        self._locked_files[sha256] = file
        while len(self._locked_files) > MAX_LOCKED_FILES:
            self._locked_files.popitem(last=False)[1].close()

    async def _download(self, path: Path, sha256: str, fetch: FetchPart) -> None:
        """Download the artifact, unless another process has done so before this one gets the lock."""
        part = await self._lock_part(path)
        try:
            if await asyncio.to_thread(path.exists):
                return
            await fetch(part)
            await asyncio.to_thread(part.commit_as, path, sha256)
        finally:
            part.close()

    async def _lock_part(self, path: Path) -> "PartialDownload":
        while True:
            part = await asyncio.to_thread(PartialDownload.open_locked, path.with_suffix(".part"))
            if part is not None:
                return part
            await asyncio.sleep(LOCK_POLL_S)

    def _evict(self) -> None:
        """Remove the least recently used files that no process has locked."""
        files = sorted((file.stat().st_mtime, file) for file in self._directory.glob("*.safetensors"))
        excess = sum(file.stat().st_size for _, file in files) - self._max_bytes
        for _, file in files:
            if excess > 0:
                excess -= _remove_unless_locked(file)
        for part in self._directory.glob("*.part"):
            if time.time() - part.stat().st_mtime > STALE_PART_S:
                _remove_unless_locked(part)


class PartialDownload:
    """A download in progress, in a file that is locked for this process."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @classmethod
    def open_locked(cls, path: Path) -> "PartialDownload | None":
        """Open and lock the part at *path* with its present content; None while another process has locked it."""
        with _translate_os_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        part = cls(path, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if not _is_file_at(file, path):  # renamed by another process between open and lock
            file.close()
            return None
        file.seek(0)
        while piece := file.read(1024**2):
            part._count(piece)
        return part

    async def add(self, piece: bytes) -> None:
        await asyncio.to_thread(self._add, piece)

    def _add(self, piece: bytes) -> None:
        with _translate_os_errors(self._path):
            self._file.write(piece)
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.size_bytes += len(piece)

    def restart(self) -> None:
        """Drop the content and start from the first byte."""
        self._file.truncate(0)
        self._digest, self.size_bytes = hashlib.sha256(), 0

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def commit_as(self, path: Path, sha256: str) -> None:
        """Rename the complete file to *path*. Raises DigestMismatch."""
        if (actual := self.digest) != sha256:
            self.restart()
            raise DigestMismatch(sha256, actual)
        with _translate_os_errors(path):
            self._file.flush()
            publish_file(self._path, path)

    def close(self) -> None:
        self._file.close()


@contextmanager
def _translate_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = (
            "free disk space" if error.errno == errno.ENOSPC else "make its directory writable for this user"
        )
        raise StoreUnavailable(path, error, remedy=remedy) from error


def _is_file_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _has_digest(file: BufferedReader, sha256: str) -> bool:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _remove_unless_locked(path: Path) -> int:
    """Remove the file. Returns the number of bytes freed, 0 if a process has locked it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        path.unlink()
        return os.fstat(file.fileno()).st_size
    return 0
