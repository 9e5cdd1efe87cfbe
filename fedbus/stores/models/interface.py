"""The interface of a model repository, and its errors.

Four results are distinct, because an error must never lead to a new first model:

    empty          `ModelStore.read_latest` returns None: the repository exists and holds no version
    unavailable    StoreUnavailable: it does not exist, or cannot be read or written now
    denied         StoreDenied: it exists, and denies access
    corrupt        StoreCorrupt: its content is invalid

A fifth one, ArtifactMissing, is about one artifact: the repository does not hold this digest.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

from pydantic import ValidationError

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreError
from fedbus.stores.models.source import Source

UNVERSIONED_GRACE_S: Final = 24 * 3600.0
"""The minimum age at which an artifact without a version is removed: a publisher may still use a younger one."""


class ArtifactMissing(StoreError):
    """The repository does not hold this artifact."""

    def __init__(self, sha256: str) -> None:
        super().__init__(f"the model repository holds no artifact {sha256}; restore it from a backup")
        self.sha256 = sha256


class ArtifactRetired(ArtifactMissing):
    """The weights of this version were removed to save space; its manifest still exists."""

    def __init__(self, sha256: str) -> None:
        StoreError.__init__(
            self,
            f"the artifact {sha256} was retired; only the newest versions keep their weights (keep-models)",
        )
        self.sha256 = sha256


class DigestMismatch(StoreError):
    """The bytes do not have the expected digest."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"the bytes have digest {actual} instead of {expected}; fetch them again")
        self.expected = expected
        self.actual = actual


class VersionTaken(StoreError):
    """Another publisher has published this version or a later one. Call `read_latest` again."""

    def __init__(self, version: int, latest: int) -> None:
        super().__init__(
            f"version {version} exists already, the latest is {latest}; read it and decide again"
        )
        self.version = version
        self.latest = latest


class VersionSkipped(StoreError):
    """The version number is not the one after the latest."""

    def __init__(self, version: int, latest: int) -> None:
        super().__init__(f"version {version} cannot follow version {latest}; publish {latest + 1}")
        self.version = version
        self.latest = latest


class VersionMissing(StoreError):
    """The version does not exist."""

    def __init__(self, version: int, known: list[int]) -> None:
        versions = f"it has {known[0]} to {known[-1]}" if known else "it has no version yet"
        super().__init__(f"the model repository has no version {version}; {versions}")
        self.version = version


class ChampionConflict(StoreError):
    """Another process has changed the champion. Read it again."""

    def __init__(self, wanted: Champion, present: Champion | None) -> None:
        state = f"version {present.version} has term {present.term}" if present else "there is no champion"
        super().__init__(
            f"version {wanted.version} cannot become champion in term {wanted.term}; {state}; read it and decide again"
        )
        self.wanted = wanted
        self.present = present


class ModelStore(Protocol):
    """The models of one task."""

    @property
    def url(self) -> str:
        """The URL that opens this repository in another process."""

    async def prepare(self) -> None:
        """Create the repository if it does not exist. Only the process that sets it up calls this."""

    async def put(self, source: Source, sha256: str | None = None) -> str:
        """Store an artifact durably, and return its digest. Storing it twice is not an error.

        *sha256* is the expected digest: raises DigestMismatch. Without it, the digest is computed.
        """

    async def local_path(self, sha256: str) -> Path:
        """Return a local file with this artifact, verified, for reading only.

        Raises ArtifactMissing and ArtifactRetired, and StoreCorrupt if the bytes have another digest.
        """

    async def list_artifacts(self) -> set[str]:
        """Return the digests of all stored artifacts, from their names alone; `verify` reads one."""

    async def publish(self, manifest: Manifest) -> Manifest:
        """Make *manifest* the latest version. Its artifact must be stored. The same manifest twice is no error.

        Raises VersionTaken, VersionSkipped and ArtifactMissing.
        """

    async def read_latest(self) -> Manifest | None:
        """Return the manifest of the latest version; None if nothing was ever published."""

    async def list_versions(self) -> list[Manifest]:
        """Return all versions, oldest first."""

    async def list_version_numbers(self) -> list[int]:
        """Return all version numbers, oldest first, whether or not their manifests can be read."""

    async def read_manifest(self, version: int) -> Manifest:
        """Return the manifest of *version*. Raises VersionMissing and StoreCorrupt."""

    async def read_champion(self) -> Champion | None:
        """Return the version to be served; None if there never was one."""

    async def set_champion(self, champion: Champion) -> Champion:
        """Make *champion* the champion, if its term follows the present one (0 without a champion).

        The same champion twice is no error. Raises ChampionConflict and VersionMissing.
        """

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        """Remove the weights of all but the newest *keep* versions, and artifacts that never became a version.

        It never removes the weights of the latest version, of the champion, of its predecessor and of their parents;
        the digests in *spare*; artifacts younger than `UNVERSIONED_GRACE_S`; and manifests. Returns the removed
        digests.
        """

    async def verify(self, sha256: str) -> None:
        """Read the stored artifact, not a local copy. Raises StoreCorrupt and ArtifactMissing."""


def check_term(champion: Champion, present: Champion | None) -> None:
    """Raise ChampionConflict unless the term of *champion* follows that of *present*."""
    if champion.term != (present.term if present else 0) + 1:
        raise ChampionConflict(champion, present)


def is_same_manifest(manifest: Manifest, other: Manifest) -> bool:
    """Return whether both have the same JSON. Objects with NaN would not be equal, since NaN differs from itself."""
    return bool(json.loads(manifest.model_dump_json()) == json.loads(other.model_dump_json()))


def encode_champion(champion: Champion) -> bytes:
    return champion.model_dump_json(indent=2).encode() + b"\n"


def decode_champion(content: bytes, place: Path | str) -> Champion:
    """Decode the champion in *content*, read from *place*. Raises StoreCorrupt."""
    try:
        return Champion.model_validate_json(content)
    except ValidationError as error:
        raise StoreCorrupt(place, f"it names no champion ({error.errors()[0]['msg']})") from error


def pointer_corrupt_error(place: Path | str, reason: object) -> StoreCorrupt:
    """Build the error for an invalid ``latest``; all versions may still exist."""
    remedy = 'write {"version": n} into it, with the last n that `fedbus model verify` reports as valid'
    return StoreCorrupt(place, reason, remedy=remedy)


def select_weights_to_keep(
    versions: list[Manifest], latest: int, keep: int, champion: Champion | None = None
) -> set[str]:
    """Return the digests of the newest *keep* versions, the latest, the champion, its predecessor and their parents."""
    assert keep >= 1
    in_use = {latest, champion.version, *champion.before[:1]} if champion else {latest}
    parents = {manifest.parent for manifest in versions if manifest.version in in_use}
    numbers = {manifest.version for manifest in versions[-keep:]} | in_use | parents
    return {manifest.sha256 for manifest in versions if manifest.version in numbers}
