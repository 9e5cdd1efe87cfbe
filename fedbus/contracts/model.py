"""Models and the bytes they travel as. An event says how much, which digest and where to get it; never the weights."""

from pydantic import AwareDatetime, ConfigDict, Field

from fedbus.contracts.identifiers import Id, Sha256
from fedbus.contracts.message import Body

MAX_BLOB_BYTES = 8 * 1024**3
MAX_INLINE_BYTES = 64 * 1024
"""What a Flower message may carry inside the event itself: configuration and metrics, no arrays."""


class BlobRef(Body):
    """Bytes that *holder* gives out by their digest, in chunks of *chunk_bytes*."""

    sha256: Sha256
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)
    chunk_bytes: int = Field(ge=1024, le=16 * 1024**2)
    holder: str = Field(pattern=r"^([a-z0-9][a-z0-9-]{0,62}\.)?[a-zA-Z0-9_-]{1,128}$")
    """Whose process, and which: ``server.flower-server_0123``."""

    @property
    def chunk_count(self) -> int:
        """How many chunks there are: at least one, so that an empty blob has an end too."""
        return max(1, -(-self.size_bytes // self.chunk_bytes))

    def chunk_size(self, index: int) -> int:
        """What the chunk at *index* holds; less than nothing where there is no such chunk."""
        if not 0 <= index < self.chunk_count:
            return -1
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)


class Artifact(Body):
    """A file of weights (safetensors), named by its digest."""

    sha256: Sha256
    size_bytes: int = Field(ge=0)
    architecture: Sha256
    """Digest over names, shapes and dtypes, so that two models can be told apart without reading them."""


class ModelRef(Artifact):
    """A published version of a task's model. Versions count from 1; version 1 is the initial model."""

    version: int = Field(ge=1)


class ModelSignature(Body):
    """The federation's Ed25519 signature of a model version: constant in size, so that it goes with every word of it.

    Signed are the version's reference and the digest of its manifest, as `fedbus.stores.models.signing` writes them.
    """

    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Which key: the beginning of the SHA-256 of its public part."""
    manifest: Sha256
    signature: bytes = Field(min_length=64, max_length=64)


class Manifest(ModelRef):
    """All that is known of a model version. Written once, never changed."""

    # A diverged run has a loss, too: null could not be read.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: Id
    created: AwareDatetime
    parent: int | None = None
    run: Id | None = None
    rounds: int = 0
    participants: dict[str, int] = Field(default_factory=dict)
    """Samples by client that went into it."""
    metrics: dict[str, float] = Field(default_factory=dict)
    code_version: str = ""
    lineage: int = 1
    """Counts the architectures there have been: versions of one lineage descend from one first model."""
    config: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """The run's overrides of the app's configuration."""
    seal: ModelSignature | None = None

    @property
    def ref(self) -> ModelRef:
        return ModelRef.model_validate(self.model_dump(include=set(ModelRef.model_fields)))
