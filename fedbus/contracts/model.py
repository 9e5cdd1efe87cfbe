"""References to models and blobs. Events carry the size, the digest and the sender of weights, never the weights."""

import hashlib
from typing import Final

from pydantic import AwareDatetime, ConfigDict, Field

from fedbus.contracts.identifiers import Id, Sha256
from fedbus.contracts.message import Body

MAX_BLOB_BYTES = 8 * 1024**3
MAX_INLINE_BYTES = 64 * 1024
"""Limit for the content of a round's message inside the event, in bytes: configuration and metrics, no arrays."""


class BlobRef(Body):
    """Bytes that the blob sender *holder* offers under their digest, in chunks of *chunk_bytes*."""

    sha256: Sha256
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)
    chunk_bytes: int = Field(ge=1024, le=16 * 1024**2)
    holder: str = Field(pattern=r"^([a-z0-9][a-z0-9-]{0,62}\.)?[a-zA-Z0-9_-]{1,128}$")
    """The owner and the process of the blob sender: ``server.flower-server_0123``."""

    @property
    def chunk_count(self) -> int:
        """The number of chunks. An empty blob has one, so that its transfer has an end."""
        return max(1, -(-self.size_bytes // self.chunk_bytes))

    def chunk_size(self, index: int) -> int:
        """Return the size of the chunk at *index*, in bytes; -1 if there is no such chunk."""
        if not 0 <= index < self.chunk_count:
            return -1
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)


EMPTY_ARCHITECTURE: Final = hashlib.sha256(b"[]").hexdigest()
"""The digest of a model without tensors: the first version of a task that builds no model."""


class Artifact(Body):
    """A file of weights (safetensors), named by its SHA-256 digest."""

    sha256: Sha256
    size_bytes: int = Field(ge=0)
    architecture: Sha256
    """The digest of all tensor names, shapes and dtypes, so that architectures can be compared without the weights."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no tensors, so that no device can serve it."""
        return self.architecture == EMPTY_ARCHITECTURE


class ModelRef(Artifact):
    """A version of a task's model. Versions count from 1; version 1 is the initial model."""

    version: int = Field(ge=1)


class ModelSignature(Body):
    """The federation's Ed25519 signature of a model version.

    It covers the reference of the version and the digest of its manifest, in the encoding of
    `fedbus.stores.models.signing`. Its size is constant, so that every message about the version can carry it.
    """

    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    """The key id: the first 16 hex digits of the SHA-256 digest of the public key."""
    manifest: Sha256
    """The digest of the manifest."""
    signature: bytes = Field(min_length=64, max_length=64)


class SimulationOrigin(Body):
    """The simulation that made a model version. With the code and the configuration, it can be repeated."""

    clients: int = Field(ge=1)
    cohort: int | None = None
    """Clients that trained in each round; None: the strategy's own sampling."""
    seed: int | None = None
    deterministic: bool = False
    partition: str = ""
    """How the data were divided between the clients: ``dirichlet:0.3``. Empty: by the app."""
    profile: str = ""
    """The SHA-256 digest of the profile of delays and absences; empty: none."""
    aggregation: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Overrides of the keys of ``[tool.fedbus.aggregation]``, such as the mode."""
    engine: str = "local"
    fedbus: str = ""
    """The version of fedbus."""


class Manifest(ModelRef):
    """The description of a model version. It is written once and never changed."""

    # A diverged run has an infinite or NaN loss, which would be written as null and could not be read.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: Id
    created: AwareDatetime
    parent: int | None = None
    run: Id | None = None
    rounds: int = 0
    participants: dict[str, int] = Field(default_factory=dict)
    """Training samples by client."""
    metrics: dict[str, float] = Field(default_factory=dict)
    evaluation_failure: str = ""
    """Why the clients' evaluation of the last round has no result: no client could evaluate. Empty if one could, or
    none had to."""
    code_version: str = ""
    lineage: int = 1
    """The number of the lineage. Versions of one lineage descend from one first model and share its architecture."""
    config: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """The run's overrides of the app's run configuration."""
    simulation: SimulationOrigin | None = None
    """Set for a version that a simulation made, which no client of the federation has trained."""
    seal: ModelSignature | None = None

    @property
    def ref(self) -> ModelRef:
        return ModelRef.model_validate(self.model_dump(include=set(ModelRef.model_fields)))
