"""The model repository in a bucket of any S3.

    <prefix>/<task>/fedbus-models.json     says that this is a repository
    <prefix>/<task>/<sha256>.safetensors   weights, immutable
    <prefix>/<task>/versions/<n>.json      a manifest, put only where there is none
    <prefix>/<task>/latest                 {"version": n}, moved by compare-and-set
    <prefix>/<task>/champion               the version that is served, moved by compare-and-set on its term

As in a directory, the version is where publishers are told apart, and the pointer is finished by
whoever comes next where its publisher died. Both rest on conditional puts. Before the first
publication they are tried out; an S3 that does not honour them is named in the log, and there a
lock in the bucket (see `s3_lock`) takes their place.

Weights stream both ways, in pieces. A download goes on where it broke, is verified, and then
lies in a cache that the processes of this machine share (see `artifact_cache`).
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from fedbus.contracts.champion import Champion
from fedbus.contracts.identifiers import TaskId
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreUnavailable
from fedbus.stores.models.artifact_cache import ArtifactCache, PartialDownload
from fedbus.stores.models.interface import (
    UNVERSIONED_GRACE_S,
    ArtifactMissing,
    ArtifactRetired,
    ChampionConflict,
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
from fedbus.stores.models.source import Source, iter_parts, iter_pieces, source_size_bytes
from fedbus.stores.s3.bucket import MAX_PARTS, PART_BYTES, Bucket, BucketAddress, ConditionalPutsUnsupported
from fedbus.stores.s3.lock import hold_lock

MARKER: Final = "fedbus-models.json"
MAX_CONCURRENT_READS: Final = 8
"""How many manifests are read at the same time."""

READ_RETRY_S: Final = 10.0
"""How patient we are with an S3 that does not answer; who asked will ask again, knowing better what for."""
TRANSFER_RETRY_S: Final = 90.0
"""The same for weights: a run's work is in them, so that an S3 may be away for a minute."""

log = structlog.get_logger("fedbus.models_s3")


@dataclass(frozen=True)
class _LatestPointer:
    """What ``latest`` says: 0 and no tag where it is not there."""

    version: int
    tag: str


class S3ModelStore:
    """The models of *task* in the bucket at *address*."""

    def __init__(
        self,
        address: BucketAddress,
        task: TaskId,
        *,
        patience_s: float | None = None,
        cache: ArtifactCache | None = None,
    ) -> None:
        self.url = address.url
        self._place = str(address)
        self._bucket = Bucket(address, patience_s=READ_RETRY_S if patience_s is None else patience_s)
        self._transfer_bucket = Bucket(
            address, patience_s=TRANSFER_RETRY_S if patience_s is None else patience_s
        )
        self._home = f"{address.prefix}/{task}" if address.prefix else str(task)
        self._cache = cache or ArtifactCache((address.cache or _default_cache()) / task)
        self._has_conditional_puts: bool | None = None
        self._uploaded: set[str] = set()
        """What we have sent whole. What lies there of others may be damaged, whatever its size: it is sent again."""

    async def prepare(self) -> None:
        async with self._bucket.open():
            if await self._bucket.read(self._key(MARKER)) is None:
                await self._bucket.write(self._key(MARKER), b'{"layout": 1}\n')

    async def put(self, source: Source, sha256: str | None = None) -> str:
        size = await asyncio.to_thread(source_size_bytes, source)
        digest = (
            await asyncio.to_thread(_compute_digest, source) if sha256 is None else sha256
        )  # it has a name first
        key = self._artifact_key(digest)
        async with self._transfer_bucket.open():
            if digest in self._uploaded and await self._transfer_bucket.read_size(key) == size:
                await asyncio.to_thread(_consume, _iter_parts(source, size, digest))
                return digest
            await self._check_exists(self._transfer_bucket)
            if size > PART_BYTES:
                await self._transfer_bucket.upload(key, size, _iter_parts(source, size, digest))
            else:
                whole = await asyncio.to_thread(b"".join, _iter_parts(source, size, digest))
                await self._transfer_bucket.write(key, whole)
        self._uploaded.add(digest)
        return digest

    async def path_of(self, sha256: str) -> Path:
        async def fetch(part: PartialDownload) -> None:
            if not await self._transfer_bucket.download(self._artifact_key(sha256), part):
                raise await self._missing_error(sha256)
            if part.digest != sha256:  # a part from before may be to blame: once more, from the start
                part.begin_anew()
                await self._transfer_bucket.download(self._artifact_key(sha256), part)

        try:
            return await self._cache.path_of(sha256, fetch)
        except DigestMismatch as mismatch:
            raise self._corrupt_error(sha256, mismatch.actual) from None

    async def held(self) -> set[str]:
        async with self._bucket.open():
            listed = {one.key for one in await self._bucket.list_objects(f"{self._home}/")}
            if not listed:
                await self._check_exists()
        names = {Path(key).stem for key in listed}
        return {name for name in names if self._artifact_key(name) in listed}

    async def verify(self, sha256: str) -> None:
        reader = _HashingSink()
        if not await self._transfer_bucket.download(self._artifact_key(sha256), reader):
            raise await self._missing_error(sha256)
        if reader.digest.hexdigest() != sha256:
            raise self._corrupt_error(sha256, reader.digest.hexdigest())

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        async with self._bucket.open():
            versions = await self.versions()
            latest, _ = await self._resolve_latest()
            kept = select_weights_to_keep(versions, latest, keep, await self.champion()) | set(spare)
            once = {one.sha256 for one in versions}
            gone = []
            for one in await self._bucket.list_objects(f"{self._home}/"):
                name = Path(one.key)
                if one.key != self._artifact_key(name.stem) or name.stem in kept:
                    continue
                if name.stem in once:  # first the tombstone: what is gone without one is a loss
                    await self._bucket.write(self._tombstone_key(name.stem), b"")
                elif (datetime.now(UTC) - one.modified).total_seconds() < UNVERSIONED_GRACE_S:
                    continue
                await self._bucket.delete(one.key)
                gone.append(name.stem)
        return sorted(gone)

    async def publish(self, manifest: Manifest) -> Manifest:
        async with self._bucket.open():
            await self._check_artifact(manifest)
            async with self._lock_unless_conditional():
                latest, pointer = await self._resolve_latest()
                if manifest.version > latest + 1:
                    raise VersionSkipped(manifest.version, latest)
                if manifest.version > latest and not await self._create(
                    self._version_key(manifest.version), _encode_manifest(manifest)
                ):
                    latest = manifest.version  # somebody was quicker, or we were and the answer was lost
                if manifest.version <= latest:
                    await self._check_same_manifest(manifest, latest)
                await self._write_pointer(manifest.version, pointer)
        return manifest

    async def latest(self) -> Manifest | None:
        async with self._bucket.open():
            pointer = await self._read_pointer()
            number = pointer.version
            if await self._bucket.read(self._version_key(number + 1)) is not None:
                number = await self._finish_pending_publish()
            return await self._read_manifest(number) if number else None

    async def versions(self) -> list[Manifest]:
        async with self._bucket.open():
            numbers = await self.list_version_numbers()
            gate = asyncio.Semaphore(MAX_CONCURRENT_READS)

            async def read(number: int) -> Manifest:
                async with gate:
                    return await self._read_manifest(number)

            return list(await asyncio.gather(*(read(number) for number in numbers)))

    async def list_version_numbers(self) -> list[int]:
        async with self._bucket.open():
            if not (found := await self._list_version_numbers()):
                await self._check_exists()
            return found

    async def manifest(self, version: int) -> Manifest:
        async with self._bucket.open():
            if version not in (known := await self.list_version_numbers()):
                raise VersionMissing(version, known)
            return await self._read_manifest(version)

    async def champion(self) -> Champion | None:
        async with self._bucket.open():
            return (await self._read_champion())[0]

    async def crown(self, champion: Champion) -> Champion:
        async with self._bucket.open():
            if champion.version not in (known := await self.list_version_numbers()):
                raise VersionMissing(champion.version, known)
            async with self._lock_unless_conditional():
                present, tag = await self._read_champion()
                if present == champion:
                    return champion
                check_term(champion, present)
                if not await self._replace(self._key("champion"), encode_champion(champion), tag):
                    (
                        present,
                        _,
                    ) = (
                        await self._read_champion()
                    )  # somebody was quicker, or we were and the answer was lost
                    if present != champion:
                        raise ChampionConflict(champion, present)
        return champion

    async def _read_champion(self) -> tuple[Champion | None, str]:
        """The champion, and the tag that its pointer has; None and no tag where there is none."""
        found = await self._bucket.read(self._key("champion"))
        if found is None:
            await self._check_exists()
            return None, ""
        return decode_champion(found.content, f"{self._place}, {self._key('champion')}"), found.tag

    # --- the pointer ---------------------------------------------------------------------------

    async def _finish_pending_publish(self) -> int:
        """The latest version, after finishing what a publisher has left; a reader may see it, and not finish it."""
        try:
            async with self._lock_unless_conditional():
                number, pointer = await self._resolve_latest()
                await self._write_pointer(number, pointer)
        except StoreDenied:
            number, _ = await self._resolve_latest()
        return number

    async def _resolve_latest(self) -> tuple[int, _LatestPointer]:
        """The latest version, whether or not the pointer is there yet; 0 where there is none."""
        pointer = await self._read_pointer()
        number = pointer.version
        while await self._bucket.read(self._version_key(number + 1)) is not None:
            number += 1
        return number, pointer

    async def _read_pointer(self) -> _LatestPointer:
        found = await self._bucket.read(self._key("latest"))
        if found is None:
            numbers = await self._list_version_numbers()
            if numbers not in ([], [1]):
                raise pointer_corrupt_error(
                    f"{self._place}, {self._key('latest')}", "it is gone, but there are versions"
                )
            if not numbers:
                await self._check_exists()
            return _LatestPointer(0, "")
        return _LatestPointer(self._parse_pointer(found.content), found.tag)

    def _parse_pointer(self, content: bytes) -> int:
        place = f"{self._place}, {self._key('latest')}"
        try:
            number = json.loads(content)["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise pointer_corrupt_error(place, f"it does not name a version ({error})") from error
        if type(number) is not int or number < 1:
            raise pointer_corrupt_error(place, f"it names version {number!r}")
        return number

    async def _write_pointer(self, number: int, pointer: _LatestPointer) -> None:
        """Move the pointer on to *number*; whoever has moved it there or further was quicker, and right."""
        while pointer.version < number:
            content = json.dumps({"version": number}).encode() + b"\n"
            if await self._replace(self._key("latest"), content, pointer.tag):
                return
            pointer = await self._read_pointer()

    # --- compare and set -------------------------------------------------------------------------

    @asynccontextmanager
    async def _lock_unless_conditional(self) -> AsyncIterator[None]:
        """Alone, where the S3 itself does not tell publishers apart."""
        if await self._check_conditional_puts():
            yield
            return
        async with hold_lock(self._bucket, self._key("lock/")):
            yield

    async def _check_conditional_puts(self) -> bool:
        if self._has_conditional_puts is None:
            self._has_conditional_puts = await self._probe_conditional_puts()
            if not self._has_conditional_puts:
                log.warning(
                    "this S3 knows no conditional puts: a lock in the bucket takes their place",
                    store=self._place,
                )
        return self._has_conditional_puts

    async def _probe_conditional_puts(self) -> bool:
        """Whether a put that must not succeed does not."""
        key = self._key(f"trial/{os.urandom(8).hex()}")
        try:
            await self._bucket.create(key, b"1")
            return not (
                await self._bucket.create(key, b"2") or await self._bucket.replace(key, b"3", f'"{"0" * 32}"')
            )
        except ConditionalPutsUnsupported:
            return False
        finally:
            await self._bucket.delete(key)

    async def _create(self, key: str, content: bytes) -> bool:
        if self._has_conditional_puts:
            return await self._bucket.create(key, content)
        return await self._replace(key, content, "")

    async def _replace(self, key: str, content: bytes, tag: str) -> bool:
        """Put it in the place of what has *tag*, or of nothing."""
        if self._has_conditional_puts:
            put = self._bucket.replace(key, content, tag) if tag else self._bucket.create(key, content)
            return await put
        there = await self._bucket.read(key)  # under the lock
        if (there.tag if there else "") != tag:
            return False
        await self._bucket.write(key, content)
        return True

    # --- what is there -----------------------------------------------------------------------------

    async def _check_artifact(self, manifest: Manifest) -> None:
        size = await self._bucket.read_size(self._artifact_key(manifest.sha256))
        if size is None:
            await self._check_exists()
            raise ArtifactMissing(manifest.sha256)
        if size != manifest.size_bytes:
            raise StoreCorrupt(
                f"{self._place}, {self._artifact_key(manifest.sha256)}",
                f"it has {size} bytes and not {manifest.size_bytes}",
            )

    async def _check_same_manifest(self, manifest: Manifest, latest: int) -> None:
        if not is_same_manifest(await self._read_manifest(manifest.version), manifest):
            raise VersionTaken(manifest.version, latest)

    async def _read_manifest(self, version: int) -> Manifest:
        key = self._version_key(version)
        place = f"{self._place}, {key}"
        found = await self._bucket.read(key)
        if found is None:
            raise StoreCorrupt(place, "it is the latest version, and is not there")
        try:
            manifest = Manifest.model_validate_json(found.content)
        except ValidationError as error:
            raise StoreCorrupt(place, error.errors()[0]["msg"]) from error
        if manifest.version != version:
            raise StoreCorrupt(place, f"it says that it is version {manifest.version}")
        return manifest

    async def _list_version_numbers(self) -> list[int]:
        names = [Path(one.key) for one in await self._bucket.list_objects(self._key("versions/"))]
        return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdecimal())

    async def _check_exists(self, bucket: Bucket | None = None) -> None:
        # a mistaken prefix looks like an empty repository: only the mark says that it is ours
        if await (bucket or self._bucket).read(self._key(MARKER)) is None:
            raise StoreUnavailable(
                self._place,
                f"there is no model repository under {self._home}/",
                remedy="correct its address; where there never was one, a server makes it when it starts",
            )

    def _corrupt_error(self, sha256: str, actual: str) -> StoreCorrupt:
        return StoreCorrupt(f"{self._place}, {self._artifact_key(sha256)}", f"its bytes have digest {actual}")

    async def _missing_error(self, sha256: str) -> ArtifactMissing:
        retired = await self._bucket.read(self._tombstone_key(sha256)) is not None
        return ArtifactRetired(sha256) if retired else ArtifactMissing(sha256)

    def _tombstone_key(self, sha256: str) -> str:
        return self._key(f"retired/{sha256}")

    def _key(self, name: str) -> str:
        return f"{self._home}/{name}"

    def _artifact_key(self, sha256: str) -> str:
        return self._key(f"{sha256}.safetensors")

    def _version_key(self, version: int) -> str:
        return self._key(f"versions/{version}.json")


async def list_tasks_in_bucket(url: str, patience_s: float | None) -> list[str]:
    address = BucketAddress.parse(url)
    bucket = Bucket(address, patience_s=READ_RETRY_S if patience_s is None else patience_s)
    prefix = f"{address.prefix}/" if address.prefix else ""
    async with bucket.open():
        folders = await bucket.list_folders(prefix)
        marks = await asyncio.gather(*(bucket.read_size(f"{folder}{MARKER}") for folder in folders))
    names = [folder.removeprefix(prefix).strip("/") for folder in folders]
    return sorted(name for name, mark in zip(names, marks, strict=True) if mark is not None)


class _HashingSink:
    """Hashes what it is given, and keeps nothing."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    async def add(self, piece: bytes) -> None:
        await asyncio.to_thread(self.digest.update, piece)
        self.size_bytes += len(piece)


def _iter_parts(source: Source, size_bytes: int, sha256: str) -> Iterator[bytes]:
    """*source* in parts; raises DigestMismatch in the place of its end, where it is not what it should be."""
    digest = hashlib.sha256()
    part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
    for part in iter_parts(source, part_bytes):
        digest.update(part)
        yield part
    if digest.hexdigest() != sha256:
        raise DigestMismatch(sha256, digest.hexdigest())


def _compute_digest(source: Source) -> str:
    digest = hashlib.sha256()
    for piece in iter_pieces(source, PART_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _consume(parts: Iterator[bytes]) -> None:
    for _ in parts:
        pass


def _encode_manifest(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode() + b"\n"


def _default_cache() -> Path:
    return Path(os.environ.get("FEDBUS_HOME") or ".fedbus").expanduser().absolute() / "cache" / "models"
