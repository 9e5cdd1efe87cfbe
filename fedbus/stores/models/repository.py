"""The model repository: versions, the champion pointer and retirement, above any `ObjectStore`.

    fedbus-models.json       marks the folder as a model repository
    <sha256>.safetensors     the weights of a model; never changed
    versions/<n>.json        the manifest of a version; created once, never changed
    latest                   {"version": n}; changed by compare-and-set
    champion                 the served version; changed by compare-and-set on its term
    retired/<sha256>         an empty object for weights that were removed

Of two publishers of one version, the one that creates the manifest wins; the other gets VersionTaken. A publisher
that dies before it moves ``latest`` leaves a version that no pointer names; the next call of `read_latest` or `publish`
finishes the move.
"""

import asyncio
import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Final

from pydantic import ValidationError

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreUnavailable
from fedbus.stores.models.interface import (
    UNVERSIONED_GRACE_S,
    ArtifactMissing,
    ArtifactRetired,
    ChampionConflict,
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
from fedbus.stores.models.object_store import (
    ABSENT,
    ARTIFACT_SUFFIX,
    MARKER,
    HashedSource,
    ObjectStore,
    artifact_key,
)
from fedbus.stores.models.source import Source

LATEST: Final = "latest"
CHAMPION: Final = "champion"
VERSIONS: Final = "versions/"
MAX_CONCURRENT_READS: Final = 8
"""The limit of concurrent reads of manifests."""


@dataclass(frozen=True)
class _LatestPointer:
    """The content of ``latest``: 0 and `ABSENT` if it does not exist."""

    version: int
    tag: str


class ModelRepository:
    """The models of one task in *objects*.

    *transfers* is the same store with more patience, for artifacts: a run's work is in them.
    """

    def __init__(self, objects: ObjectStore, transfers: ObjectStore | None = None) -> None:
        self.url = objects.url
        self._objects = objects
        self._transfers = transfers or objects

    async def prepare(self) -> None:
        async with self._objects.session():
            await self._objects.prepare()
            if await self._objects.get(MARKER) is None:
                await self._objects.put(MARKER, b'{"layout": 1}\n')

    # --- artifacts ---

    async def put(self, source: Source, sha256: str | None = None) -> str:
        async with self._transfers.session():
            await _check_exists(self._transfers)
            return await self._transfers.put_artifact(HashedSource(source, sha256))

    async def local_path(self, sha256: str) -> Path:
        async with self._transfers.session():
            path = await self._transfers.artifact_file(sha256)
        if path is None:
            raise await self._missing_error(sha256)
        return path

    async def verify(self, sha256: str) -> None:
        sink = _HashingSink()
        async with self._transfers.session():
            exists = await self._transfers.read_artifact(sha256, sink)
        if not exists:
            raise await self._missing_error(sha256)
        if (actual := sink.digest.hexdigest()) != sha256:
            raise StoreCorrupt(self._objects.place(artifact_key(sha256)), f"its bytes have digest {actual}")

    async def list_artifacts(self) -> set[str]:
        async with self._objects.session():
            objects = await self._objects.list_objects()
            if not objects:
                await _check_exists(self._objects)
        return {sha256 for info in objects if (sha256 := _digest_in(info.key))}

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        async with self._objects.session():
            versions = await self.list_versions()
            latest, _ = await self._resolve_latest()
            needed = select_weights_to_keep(versions, latest, keep, await self.read_champion()) | set(spare)
            versioned = {manifest.sha256 for manifest in versions}
            removed = []
            for info in await self._objects.list_objects():
                sha256 = _digest_in(info.key)
                if not sha256 or sha256 in needed:
                    continue
                if sha256 in versioned:  # the tombstone first: without one, missing weights count as lost
                    await self._objects.put(_tombstone_key(sha256), b"")
                elif (datetime.now(UTC) - info.modified).total_seconds() < UNVERSIONED_GRACE_S:
                    continue
                await self._objects.delete(info.key)
                removed.append(sha256)
        return sorted(removed)

    async def _missing_error(self, sha256: str) -> ArtifactMissing:
        async with self._objects.session():
            if await self._objects.get(_tombstone_key(sha256)) is not None:
                return ArtifactRetired(sha256)
            await _check_exists(self._objects)
        return ArtifactMissing(sha256)

    # --- versions ---

    async def publish(self, manifest: Manifest) -> Manifest:
        async with self._objects.session():
            await self._check_artifact(manifest)
            latest, pointer = await self._resolve_latest()
            if manifest.version > latest + 1:
                raise VersionSkipped(manifest.version, latest)
            if manifest.version > latest and not await self._objects.put(
                _version_key(manifest.version), _encode_manifest(manifest), tag=ABSENT
            ):
                # another publisher was first, or the response to the own put was lost
                latest = manifest.version
            if manifest.version <= latest:
                await self._check_same_manifest(manifest, latest)
            await self._write_pointer(manifest.version, pointer)
        return manifest

    async def read_latest(self) -> Manifest | None:
        async with self._objects.session():
            number = (await self._read_pointer()).version
            if await self._objects.get(_version_key(number + 1)) is not None:
                number = await self._finish_pending_publish()
            return await self._read_manifest(number) if number else None

    async def list_versions(self) -> list[Manifest]:
        async with self._objects.session():
            numbers = await self.list_version_numbers()
            gate = asyncio.Semaphore(MAX_CONCURRENT_READS)

            async def read(number: int) -> Manifest:
                async with gate:
                    return await self._read_manifest(number)

            return list(await asyncio.gather(*(read(number) for number in numbers)))

    async def list_version_numbers(self) -> list[int]:
        async with self._objects.session():
            if not (numbers := await self._list_version_numbers()):
                await _check_exists(self._objects)
            return numbers

    async def read_manifest(self, version: int) -> Manifest:
        async with self._objects.session():
            await self._check_version(version)
            return await self._read_manifest(version)

    async def _check_version(self, version: int) -> None:
        if version not in (numbers := await self.list_version_numbers()):
            raise VersionMissing(version, numbers)

    async def _check_artifact(self, manifest: Manifest) -> None:
        size = await self._objects.artifact_size(manifest.sha256)
        if size is None:
            raise await self._missing_error(manifest.sha256)
        if size != manifest.size_bytes:
            place = self._objects.place(artifact_key(manifest.sha256))
            raise StoreCorrupt(place, f"it has {size} bytes instead of {manifest.size_bytes}")

    async def _check_same_manifest(self, manifest: Manifest, latest: int) -> None:
        if not is_same_manifest(await self._read_manifest(manifest.version), manifest):
            raise VersionTaken(manifest.version, latest)

    async def _read_manifest(self, version: int) -> Manifest:
        key = _version_key(version)
        place = self._objects.place(key)
        stored = await self._objects.get(key)
        if stored is None:
            raise StoreCorrupt(place, "the manifest of this version does not exist")
        try:
            manifest = Manifest.model_validate_json(stored.content)
        except ValidationError as error:
            raise StoreCorrupt(place, error.errors()[0]["msg"]) from error
        if manifest.version != version:
            raise StoreCorrupt(place, f"it is the manifest of version {manifest.version}")
        return manifest

    async def _list_version_numbers(self) -> list[int]:
        names = [PurePosixPath(info.key) for info in await self._objects.list_objects(VERSIONS)]
        return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdecimal())

    # --- the pointer to the latest version ---

    async def _finish_pending_publish(self) -> int:
        """Finish the publish of a process that died, and return the latest version. Without write access, only read."""
        number, pointer = await self._resolve_latest()
        with suppress(StoreDenied):
            await self._write_pointer(number, pointer)
        return number

    async def _resolve_latest(self) -> tuple[int, _LatestPointer]:
        """Return the latest version, whether or not the pointer names it yet; 0 if there is none."""
        pointer = await self._read_pointer()
        number = pointer.version
        while await self._objects.get(_version_key(number + 1)) is not None:
            number += 1
        return number, pointer

    async def _read_pointer(self) -> _LatestPointer:
        stored = await self._objects.get(LATEST)
        if stored is None:
            numbers = await self._list_version_numbers()
            if numbers not in ([], [1]):
                raise pointer_corrupt_error(
                    self._objects.place(LATEST), "it does not exist, but there are versions"
                )
            if not numbers:
                await _check_exists(self._objects)
            return _LatestPointer(0, ABSENT)
        return _LatestPointer(self._parse_pointer(stored.content), stored.tag)

    def _parse_pointer(self, content: bytes) -> int:
        place = self._objects.place(LATEST)
        try:
            number = json.loads(content)["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise pointer_corrupt_error(place, f"it does not name a version ({error})") from error
        if type(number) is not int or number < 1:
            raise pointer_corrupt_error(place, f"it names version {number!r}")
        return number

    async def _write_pointer(self, number: int, pointer: _LatestPointer) -> None:
        """Move the pointer to *number*, unless another publisher has moved it there or further."""
        while pointer.version < number:
            content = json.dumps({"version": number}).encode() + b"\n"
            if await self._objects.put(LATEST, content, tag=pointer.tag):
                return
            pointer = await self._read_pointer()

    # --- the champion ---

    async def read_champion(self) -> Champion | None:
        async with self._objects.session():
            return (await self._read_champion())[0]

    async def set_champion(self, champion: Champion) -> Champion:
        async with self._objects.session():
            await self._check_version(champion.version)
            present, tag = await self._read_champion()
            if present == champion:
                return champion
            check_term(champion, present)
            if not await self._objects.put(CHAMPION, encode_champion(champion), tag=tag):
                present, _ = await self._read_champion()
                if present != champion:  # equal if the response to the own put was lost
                    raise ChampionConflict(champion, present)
        return champion

    async def _read_champion(self) -> tuple[Champion | None, str]:
        """Return the champion and the tag of its pointer; None and `ABSENT` if there is none."""
        stored = await self._objects.get(CHAMPION)
        if stored is None:
            await _check_exists(self._objects)
            return None, ABSENT
        return decode_champion(stored.content, self._objects.place(CHAMPION)), stored.tag


async def _check_exists(objects: ObjectStore) -> None:
    """Raise StoreUnavailable if there is no repository: an unmounted volume or a wrong prefix looks empty."""
    if await objects.get(MARKER) is None:
        raise StoreUnavailable(
            objects.place(),
            "there is no model repository, or its volume is not mounted",
            remedy="mount the volume, or correct the address (--store); a server creates a new repository",
        )


class _HashingSink:
    """Hashes a download without keeping it."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    async def add(self, piece: bytes) -> None:
        await asyncio.to_thread(self.digest.update, piece)
        self.size_bytes += len(piece)


def _digest_in(key: str) -> str:
    """Return the digest of the artifact that *key* names; empty for other keys."""
    return key.removesuffix(ARTIFACT_SUFFIX) if key.endswith(ARTIFACT_SUFFIX) and "/" not in key else ""


def _version_key(version: int) -> str:
    return f"{VERSIONS}{version}.json"


def _tombstone_key(sha256: str) -> str:
    return f"retired/{sha256}"


def _encode_manifest(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode() + b"\n"
