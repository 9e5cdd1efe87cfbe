"""What every backend of the model repository promises, and the errors that tell its answers apart.

Four answers are kept apart, because a model must never be initialised anew on an error:

    empty          `ModelStore.latest` returned None: the repository is there and holds no version
    unavailable    StoreUnavailable: it is not there, or cannot be read or written now
    denied         StoreDenied: it is there, and not for us
    damaged        StoreDamaged: it answers nonsense

and beside them *missing*, ArtifactMissing: a digest that it does not hold.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreError
from fedbus.stores.source import Source

FRESH_S: Final = 24 * 3600.0
"""An artifact without a version may yet become one for so long."""


class UnknownStore(StoreError):
    """A URL of a kind that no backend here understands."""


class ArtifactMissing(StoreError):
    """The repository does not hold this artifact."""

    def __init__(self, sha256: str) -> None:
        super().__init__(f"the model repository holds no artifact {sha256}: put it there first")
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
        """A local file with this artifact, to be read and never written."""

    async def publish(self, manifest: Manifest) -> Manifest:
        """Make *manifest* the latest version. Its artifact must be here. The same manifest twice is fine."""

    async def latest(self) -> Manifest | None:
        """The manifest of the latest version; None where nothing was ever published."""

    async def versions(self) -> list[Manifest]:
        """All versions, oldest first."""

    async def numbers(self) -> list[int]:
        """The versions that are there, oldest first, whether or not their manifests can be read."""

    async def manifest(self, version: int) -> Manifest:
        """The manifest of *version*; raises VersionMissing, StoreDamaged."""

    async def retire(self, *, keep: int, spare: Collection[str] = ()) -> list[str]:
        """Remove the weights of all but the newest *keep* versions, and those that never came to be one.

        Never removed are the latest version's, those of the version it was made from, what *spare* names, and
        what was put within a day. Manifests stay. Answers what was removed.
        """

    async def verify(self, sha256: str) -> None:
        """Read an artifact where it is kept, not a copy of it; raises StoreDamaged, ArtifactMissing."""


def weights_to_keep(versions: list[Manifest], latest: int, keep: int) -> set[str]:
    """The digests of the newest *keep* versions, of the latest, and of the one that it was made from."""
    assert keep >= 1
    parents = {one.parent for one in versions if one.version == latest}
    numbers = {one.version for one in versions[-keep:]} | {latest} | parents
    return {one.sha256 for one in versions if one.version in numbers}
