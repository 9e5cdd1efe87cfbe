"""A cache of arrays on disk, which the processes of a machine share.

An entry is a folder of ``.npy`` files that appears whole or not at all. One process computes an entry while the others
wait for its lock, which ends with its process. The arrays are memory-mapped and read-only. The cache can be deleted at
any time. Where it cannot be written (a full disk, a read-only file system), the arrays stay in memory.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from fedbus.common.filesystem import SHARED_MODE
from fedbus.learning.data.images import Array

CACHE_FOLDER: Final = Path("cache", "data")
_log = structlog.get_logger()


def home_folder() -> Path:
    """Return FEDBUS_HOME, by default ``.fedbus`` in the working directory."""
    return Path(os.environ.get("FEDBUS_HOME") or ".fedbus").expanduser().absolute()


def content_key(*parts: object) -> str:
    """Return a digest of *parts*; a part is bytes, or anything that its text identifies."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()[:32]


def cached_arrays(key: str, build: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
    """Return the arrays of the entry *key*; if there is none, *build* them and store them."""
    folder = home_folder() / CACHE_FOLDER
    entry = folder / key
    if (arrays := _read_entry(entry)) is not None:
        return arrays
    with _entry_lock(folder, key) as is_locked:
        if (arrays := _read_entry(entry)) is not None:
            return arrays
        built = build()
        if not is_locked:
            return _read_only(built)
        try:
            _write_entry(entry, built)
        except OSError as error:
            _log.warning("Data cache not written", folder=str(folder), reason=error.strerror or str(error))
            return _read_only(built)
        return _read_entry(entry) or _read_only(built)


@contextmanager
def _entry_lock(folder: Path, key: str) -> Iterator[bool]:
    """Hold the lock of the entry *key*; yield false where the cache cannot be written."""
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SHARED_MODE)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left_behind in folder.glob(f".{key}.*.part"):
                shutil.rmtree(left_behind, ignore_errors=True)
        except OSError as error:
            _log.warning("Data cache not writable", folder=str(folder), reason=error.strerror or str(error))
            yield False
            return
        yield True
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _read_entry(entry: Path) -> dict[str, Array] | None:
    """Return the arrays of an entry; None if it does not exist or is damaged."""
    try:
        files = sorted(entry.glob("*.npy"))
        return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files} or None
    except (OSError, ValueError, EOFError):
        return None


def _write_entry(entry: Path, arrays: Mapping[str, Array]) -> None:
    part = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".part", dir=entry.parent))
    try:
        part.chmod(0o755)
        for name, array in arrays.items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(entry, ignore_errors=True)  # a damaged entry
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read_only(arrays: Mapping[str, Array]) -> dict[str, Array]:
    for array in arrays.values():
        array.setflags(write=False)
    return dict(arrays)
