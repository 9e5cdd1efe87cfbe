"""The model repository in a directory, on one machine or shared between machines whose file system honours
links and locks. Bytes are hashed before they are used: once by each process, for as long as the file is the same.

    <task>/<sha256>.safetensors    weights, immutable
    <task>/versions/<n>.json       a manifest, written once and never changed
    <task>/latest                  {"version": n}, moved by compare-and-set
    <task>/champion                the version that is served, moved by compare-and-set on its term

The version file is where two publishers are told apart: exactly one can create it, the other
gets VersionTaken. A publisher that dies before it has moved ``latest`` leaves a version that
nobody points to; whoever asks for the latest next finishes that move.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from pydantic import ValidationError

from fedbus.contracts.champion import Champion
from fedbus.contracts.identifiers import TaskId
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreUnavailable
from fedbus.stores.models.interface import (
    UNVERSIONED_GRACE_S,
    ArtifactMissing,
    ArtifactRetired,
    DigestMismatch,
    VersionMissing,
    VersionSkipped,
    VersionTaken,
    check_term,
    decode_champion,
    encode_champion,
    is_same_manifest,
    pointer_corrupt_error,
    select_weights_to_keep,
)
from fedbus.stores.models.source import Source, iter_pieces

_CHUNK_BYTES: Final = 1024 * 1024
_STALE_PART_S: Final = 3600.0
_MARKER: Final = "fedbus-models.json"

P = ParamSpec("P")
T = TypeVar("T")


class DirectoryModelStore:
    """The models of *task* in the directory *root*."""

    def __init__(self, root: Path, task: TaskId) -> None:
        self.url = str(root)
        self._home = root / task
        self._versions = self._home / "versions"
        self._pointer = self._home / "latest"
        self._champion_file = self._home / "champion"

    async def prepare(self) -> None:
        await self._run_in_thread(self._prepare)

    async def put(self, source: Source, sha256: str | None = None) -> str:
        return await self._run_in_thread(self._put, source, sha256)

    async def path_of(self, sha256: str) -> Path:
        return await self._run_in_thread(self._local_path, sha256)

    async def held(self) -> set[str]:
        return await self._run_in_thread(self._list_artifacts)

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        return await self._run_in_thread(self._retire, keep, frozenset(spare))

    async def verify(self, sha256: str) -> None:
        await self._run_in_thread(self._verify, sha256)

    async def publish(self, manifest: Manifest) -> Manifest:
        return await self._run_in_thread(self._publish, manifest)

    async def latest(self) -> Manifest | None:
        return await self._run_in_thread(self._read_latest)

    async def champion(self) -> Champion | None:
        return await self._run_in_thread(self._read_champion)

    async def crown(self, champion: Champion) -> Champion:
        return await self._run_in_thread(self._set_champion, champion)

    async def list_version_numbers(self) -> list[int]:
        return await self._run_in_thread(self._list_version_numbers)

    async def manifest(self, version: int) -> Manifest:
        if version not in (known := await self.list_version_numbers()):
            raise VersionMissing(version, known)
        return await self._run_in_thread(self._read_manifest, version)

    async def versions(self) -> list[Manifest]:
        return await self._run_in_thread(
            lambda: [self._read_manifest(n) for n in self._list_version_numbers()]
        )

    async def _run_in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def translated() -> T:
            try:
                return work(*args, **kwargs)
            except OSError as error:
                raise StoreUnavailable(Path(error.filename or self._home), error) from error

        return await asyncio.to_thread(translated)

    def _prepare(self) -> None:
        self._versions.mkdir(parents=True, exist_ok=True)
        for abandoned in self._home.glob(".*.part"):
            if time.time() - abandoned.stat().st_mtime > _STALE_PART_S:
                abandoned.unlink(missing_ok=True)
        mark = self._home / _MARKER
        if not mark.exists():
            with _temporary_file(self._home, b'{"layout": 1}\n') as part:
                part.replace(mark)
            _sync_directory(self._home)

    def _check_exists(self) -> None:
        # a volume that is not mounted looks like an empty directory: only the mark says that it is ours
        if not (self._home / _MARKER).is_file():
            raise StoreUnavailable(
                self._home,
                "there is no model repository, or its volume is not mounted",
                remedy="mount it, or correct its address (--store)",
            )

    def _put(self, source: Source, sha256: str | None) -> str:
        self._check_exists()
        with _temporary_copy(source, sha256, into=self._home) as (part, digest):
            part.replace(self._artifact_path(digest))
        _sync_directory(self._home)
        return digest

    def _local_path(self, sha256: str) -> Path:
        path = self._artifact_file(sha256)
        if (actual := _cached_digest(path, _file_identity(path))) != sha256:
            raise _corrupt_error(path, actual)
        return path

    def _artifact_file(self, sha256: str) -> Path:
        self._check_exists()
        path = self._artifact_path(sha256)
        if not path.is_file():
            raise (
                ArtifactRetired(sha256) if self._tombstone_path(sha256).exists() else ArtifactMissing(sha256)
            )
        return path

    def _list_artifacts(self) -> set[str]:
        self._check_exists()
        return {path.stem for path in self._home.glob("*.safetensors")}

    def _verify(self, sha256: str) -> None:
        path = self._artifact_file(sha256)
        if (actual := _compute_digest(path)) != sha256:
            raise _corrupt_error(path, actual)

    def _retire(self, keep: int, spare: frozenset[str]) -> list[str]:
        with self._lock_store():
            versions = [self._read_manifest(number) for number in self._list_version_numbers()]
            kept = (
                select_weights_to_keep(versions, self._resolve_latest(), keep, self._read_champion()) | spare
            )
            once = {one.sha256 for one in versions}
            found = [path for path in self._home.glob("*.safetensors") if path.stem not in kept]
            gone = [path for path in found if path.stem in once or _is_old(path)]
            self._tombstone_path("").mkdir(exist_ok=True)
            for path in gone:
                if path.stem in once:
                    self._tombstone_path(path.stem).touch()  # first: what is gone without one is a loss
                path.unlink()
        return sorted(path.stem for path in gone)

    def _tombstone_path(self, sha256: str) -> Path:
        return self._home / "retired" / sha256

    def _artifact_path(self, sha256: str) -> Path:
        return self._home / f"{sha256}.safetensors"

    def _publish(self, manifest: Manifest) -> Manifest:
        self._check_artifact(manifest)
        with self._lock_store():
            latest = self._resolve_latest()
            if manifest.version > latest + 1:
                raise VersionSkipped(manifest.version, latest)
            if manifest.version <= latest:
                return self._check_same_manifest(manifest, latest)
            self._write_once(manifest)
            self._write_pointer(manifest.version)
        return manifest

    def _check_artifact(self, manifest: Manifest) -> None:
        path = self._local_path(manifest.sha256)
        if (size := path.stat().st_size) != manifest.size_bytes:
            raise StoreCorrupt(path, f"it has {size} bytes and not {manifest.size_bytes}")

    def _check_same_manifest(self, manifest: Manifest, latest: int) -> Manifest:
        if not is_same_manifest(self._read_manifest(manifest.version), manifest):
            raise VersionTaken(manifest.version, latest)
        return manifest

    def _write_once(self, manifest: Manifest) -> None:
        with _temporary_file(self._home, manifest.model_dump_json(indent=2).encode() + b"\n") as part:
            try:
                os.link(part, self._version_file(manifest.version))  # like O_EXCL, and whole at once
            except FileExistsError:  # where the file system does not honour locks
                raise VersionTaken(manifest.version, manifest.version) from None
        _sync_directory(self._versions)

    def _write_pointer(self, version: int) -> None:
        with _temporary_file(self._home, json.dumps({"version": version}).encode() + b"\n") as part:
            part.replace(self._pointer)
        _sync_directory(self._home)

    def _read_latest(self) -> Manifest | None:
        number = self._read_latest_number()
        if self._version_file(number + 1).exists():
            with self._lock_store():
                number = self._resolve_latest()
        return self._read_manifest(number) if number else None

    def _resolve_latest(self) -> int:
        """The latest version, after finishing what a publisher has left when it died; 0 where there is none."""
        pointer = number = self._read_latest_number()
        while self._version_file(number + 1).exists():
            number += 1
        if number != pointer:
            self._write_pointer(number)
        return number

    def _read_champion(self) -> Champion | None:
        self._check_exists()
        try:
            return decode_champion(self._champion_file.read_bytes(), self._champion_file)
        except FileNotFoundError:
            return None

    def _set_champion(self, champion: Champion) -> Champion:
        with self._lock_store():
            present = self._read_champion()
            if present == champion:
                return champion
            check_term(champion, present)
            if champion.version not in (known := self._list_version_numbers()):
                raise VersionMissing(champion.version, known)
            with _temporary_file(self._home, encode_champion(champion)) as part:
                part.replace(self._champion_file)
            _sync_directory(self._home)
        return champion

    def _read_latest_number(self) -> int:
        """What the pointer says; 0 where nothing was ever published."""
        number = self._read_pointer()
        if number is None and self._list_version_numbers() not in ([], [1]):
            raise pointer_corrupt_error(self._pointer, "it is gone, but there are versions")
        return number or 0

    def _read_pointer(self) -> int | None:
        self._check_exists()
        try:
            number = json.loads(self._pointer.read_text())["version"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise pointer_corrupt_error(self._pointer, f"it does not name a version ({error})") from error
        if type(number) is not int or number < 1:
            raise pointer_corrupt_error(self._pointer, f"it names version {number!r}")
        return number

    def _version_file(self, version: int) -> Path:
        return self._versions / f"{version}.json"

    def _read_manifest(self, version: int) -> Manifest:
        path = self._version_file(version)
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise StoreCorrupt(path, "it is the latest version, and is not there") from error
        except ValidationError as error:
            raise StoreCorrupt(path, error.errors()[0]["msg"]) from error
        if manifest.version != version:
            raise StoreCorrupt(path, f"it says that it is version {manifest.version}")
        return manifest

    def _list_version_numbers(self) -> list[int]:
        self._check_exists()
        return sorted(int(path.stem) for path in self._versions.glob("*.json") if path.stem.isdecimal())

    @contextmanager
    def _lock_store(self) -> Iterator[None]:
        """No other process moves the pointer meanwhile."""
        with (self._home / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def list_tasks_in_directory(root: Path) -> list[str]:
    return sorted(mark.parent.name for mark in root.glob(f"*/{_MARKER}"))


def _file_identity(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to the file, or puts another in its place."""
    of = path.stat()
    return of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns


@lru_cache(4096)
def _cached_digest(path: Path, _: tuple[int, ...]) -> str:
    """The digest of the file that has this identity, taken once."""
    return _compute_digest(path)


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _corrupt_error(path: Path, actual: str) -> StoreCorrupt:
    return StoreCorrupt(path, f"its bytes have digest {actual}")


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > UNVERSIONED_GRACE_S


@contextmanager
def _temporary_file(directory: Path, content: bytes) -> Iterator[Path]:
    """A file in *directory* with *content*, on disk, that goes away unless it is renamed."""
    with _open_part(directory) as (descriptor, path):
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            _sync(file.fileno(), file.flush)
        yield path


@contextmanager
def _temporary_copy(source: Source, sha256: str | None, *, into: Path) -> Iterator[tuple[Path, str]]:
    """A copy of *source* on disk, and its digest, if that is *sha256* or nobody says what it should be."""
    digest = hashlib.sha256()
    with _open_part(into) as (descriptor, path):
        with os.fdopen(descriptor, "wb") as file:
            for piece in iter_pieces(source, _CHUNK_BYTES):
                digest.update(piece)
                file.write(piece)
            if sha256 not in (None, digest.hexdigest()):
                raise DigestMismatch(str(sha256), digest.hexdigest())
            _sync(file.fileno(), file.flush)
        yield path, digest.hexdigest()


@contextmanager
def _open_part(directory: Path) -> Iterator[tuple[int, Path]]:
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=directory)
    os.fchmod(descriptor, 0o644)
    path = Path(name)
    try:
        yield descriptor, path
    finally:
        path.unlink(missing_ok=True)


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    """A rename is on disk only when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
