"""What every backend of the model repository promises, and the errors that tell its answers apart.

Four answers are kept apart, because a model must never be initialised anew on an error:

    empty          `ModelStore.latest` returned None: the repository is there and holds no version
    unavailable    StoreUnavailable: it is not there, or cannot be read or written now
    denied         StoreDenied: it is there, and not for us
    damaged        StoreDamaged: it answers nonsense

and beside them *missing*, ArtifactMissing: a digest that it does not hold.
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
"""An artifact without a version may yet become one for so long."""


class ArtifactMissing(StoreError):
    """The repository does not hold this artifact."""

    def __init__(self, sha256: str) -> None:
        super().__init__(f"the model repository holds no artifact {sha256}: restore it from a copy")
        self.sha256 = sha256


class ArtifactRetired(ArtifactMissing):
    """It was here, and had to make room: only its manifest is left."""

    def __init__(self, sha256: str) -> None:
        StoreError.__init__(
            self,
            f"the artifact {sha256} was retired: only the newest versions keep their weights (keep-models)",
        )
        self.sha256 = sha256


class DigestMismatch(StoreError):
    """The bytes are not those that were announced."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"the bytes have digest {actual}, not {expected}: fetch them again")
        self.expected = expected
        self.actual = actual


class VersionTaken(StoreError):
    """Somebody has published this version, or a later one, before. Read `latest` again."""

    def __init__(self, version: int, latest: int) -> None:
        super().__init__(f"version {version} is taken, the latest is {latest}: read it and decide again")
        self.version = version
        self.latest = latest


class VersionSkipped(StoreError):
    """Versions count up one by one."""

    def __init__(self, version: int, latest: int) -> None:
        super().__init__(f"version {version} cannot follow version {latest}: publish {latest + 1}")
        self.version = version
        self.latest = latest


class VersionMissing(StoreError):
    """There is no such version."""

    def __init__(self, version: int, known: list[int]) -> None:
        there = f"there are {known[0]} to {known[-1]}" if known else "there is none yet"
        super().__init__(f"the model repository has no version {version}: {there}")
        self.version = version


class ChampionConflict(StoreError):
    """Somebody else has made another version the champion meanwhile. Read it again."""

    def __init__(self, wanted: Champion, present: Champion | None) -> None:
        there = f"version {present.version} is, in term {present.term}" if present else "there is none"
        super().__init__(
            f"version {wanted.version} cannot be champion in term {wanted.term}: {there}; read it and decide again"
        )
        self.wanted = wanted
        self.present = present


class ModelStore(Protocol):
    """What every backend does, for the models of one task."""

    @property
    def url(self) -> str:
        """Where it is, for `open_store` in another process."""

    async def prepare(self) -> None:
        """Make the repository where there is none. For whoever sets it up, not for whoever uses it."""

    async def put(self, source: Source, sha256: str | None = None) -> str:
        """Keep an artifact; when this returns its digest, it is whole and on disk. Twice is fine.

        *sha256*: what it should be; raises DigestMismatch. Left out, it is taken on the way.
        """

    async def path_of(self, sha256: str) -> Path:
        """A local file with this artifact, verified, to be read and never written.

        Raises ArtifactMissing, ArtifactRetired; StoreDamaged where its bytes are not those of the digest.
        """

    async def held(self) -> set[str]:
        """The digests of all artifacts that are here, by their names alone: `verify` reads one."""

    async def publish(self, manifest: Manifest) -> Manifest:
        """Make *manifest* the latest version. Its artifact must be here. The same manifest twice is fine."""

    async def latest(self) -> Manifest | None:
        """The manifest of the latest version; None where nothing was ever published."""

    async def versions(self) -> list[Manifest]:
        """All versions, oldest first."""

    async def list_version_numbers(self) -> list[int]:
        """The versions that are there, oldest first, whether or not their manifests can be read."""

    async def manifest(self, version: int) -> Manifest:
        """The manifest of *version*; raises VersionMissing, StoreDamaged."""

    async def champion(self) -> Champion | None:
        """The version that is served; None where none was ever made champion."""

    async def crown(self, champion: Champion) -> Champion:
        """Make it the champion, if the term before is the present one (no champion: 0); the same twice is fine.

        Raises ChampionMoved, VersionMissing.
        """

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        """Remove the weights of all but the newest *keep* versions, and those that never came to be one.

        Never removed are those of the latest version, of the champion, of the one before it and of the versions
        that these were made from, what *spare* names, and what was put within a day. Manifests stay. Answers what
        was removed.
        """

    async def verify(self, sha256: str) -> None:
        """Read an artifact where it is kept, not a copy of it; raises StoreDamaged, ArtifactMissing."""


def check_term(champion: Champion, present: Champion | None) -> None:
    """Raises ChampionMoved unless *champion* follows on the *present* one."""
    if champion.term != (present.term if present else 0) + 1:
        raise ChampionConflict(champion, present)


def is_same_manifest(ours: Manifest, theirs: Manifest) -> bool:
    """Whether they are one manifest, as it is written: a loss that is no number is not equal to itself."""
    return bool(json.loads(ours.model_dump_json()) == json.loads(theirs.model_dump_json()))


def encode_champion(champion: Champion) -> bytes:
    return champion.model_dump_json(indent=2).encode() + b"\n"


def decode_champion(content: bytes, place: Path | str) -> Champion:
    """What the pointer at *place* says; raises StoreDamaged."""
    try:
        return Champion.model_validate_json(content)
    except ValidationError as error:
        raise StoreCorrupt(place, f"it names no champion ({error.errors()[0]['msg']})") from error


def pointer_corrupt_error(place: Path | str, reason: object) -> StoreCorrupt:
    """What is said where ``latest`` cannot be followed: all that it points to may be there."""
    remedy = 'write {"version": n} into it, with the last n that `fedbus model verify` finds sound'
    return StoreCorrupt(place, reason, remedy=remedy)


def select_weights_to_keep(
    versions: list[Manifest], latest: int, keep: int, champion: Champion | None = None
) -> set[str]:
    """The digests of the newest *keep* versions, of the latest, of the champion and the one before it, and of
    those that they were made from.
    """
    assert keep >= 1
    in_use = {latest, champion.version, *champion.before[:1]} if champion else {latest}
    parents = {one.parent for one in versions if one.version in in_use}
    numbers = {one.version for one in versions[-keep:]} | in_use | parents
    return {one.sha256 for one in versions if one.version in numbers}
