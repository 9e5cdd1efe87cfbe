"""Signatures of model versions: Ed25519 (RFC 8032), with keys in files.

    fedbus model keygen fedbus.key        the server's: FEDBUS_SIGNING_KEY=fedbus.key
                        fedbus.key.pub    the devices': FEDBUS_TRUSTED_KEYS=fedbus.key.pub

The signature covers a short statement: the task, the version, the digest, size and architecture of the weights, and
the digest of the whole manifest. With the reference and the signature, a device can verify a model without the
manifest, whose size grows with the number of clients. With the manifest, the signature covers that too.

Statement and manifest are canonical JSON: sorted keys, no spaces, UTF-8, numbers in the shortest form that Python
reads back unchanged (RFC 8785 except for the form of exponents). The payload type precedes the statement, as in the
pre-authentication encoding of DSSE, so that a signature is not valid for data of another type.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedbus.contracts.model import Manifest, ModelRef, ModelSignature
from fedbus.stores.errors import StoreError

PAYLOAD_TYPE: Final = b"application/vnd.fedbus.model+json"
ALGORITHM: Final = "ed25519"
_KEY_ID_CHARS: Final = 16
_PRIVATE_MODE: Final = 0o600


class InvalidKey(StoreError):
    """A key file does not hold a valid key of the expected kind."""


class SignatureMissing(StoreError):
    """The model has no signature, and only signed models may be served."""


class SignatureInvalid(StoreError):
    """The signature was not made over this model by a trusted key."""


def generate_key(path: Path) -> Path:
    """Write a private key to *path* and its public key to ``<path>.pub``, and return the latter. Raises InvalidKey."""
    public = path.with_name(f"{path.name}.pub")
    if path.exists() or public.exists():
        raise InvalidKey(
            f"{path} exists already; a key is never overwritten, because models are signed with it"
        )
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    public.write_text(f"{_format_key(key.public_key())}  # {path.name}\n")
    return public


class ModelSigner:
    """Signs the model versions of a federation."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = _key_id(key.public_key())

    @classmethod
    def load(cls, path: Path) -> "ModelSigner":
        """Read the private key in *path*. Raises InvalidKey."""
        content = _read_key_file(path)
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidKey(
                f"{path} holds no private key; create one with fedbus model keygen ({error})"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidKey(f"{path} holds a key that is not Ed25519; create one with fedbus model keygen")
        return cls(key)

    def sign(self, manifest: Manifest) -> Manifest:
        """Return *manifest* with its signature."""
        digest = compute_manifest_digest(manifest)
        signature = self._key.sign(_signed_payload(manifest.task, manifest, digest))
        return manifest.model_copy(
            update={"seal": ModelSignature(key=self.key_id, manifest=digest, signature=signature)}
        )


class TrustedKeys:
    """The public keys whose models may be served; several during a key rotation."""

    def __init__(self, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._keys = dict(keys)

    @classmethod
    def load(cls, path: Path) -> "TrustedKeys":
        """Read the public keys in *path*, one per line, with comments after ``#``. Raises InvalidKey."""
        content = _read_key_file(path).decode(errors="replace")
        if "PRIVATE KEY" in content:
            raise InvalidKey(
                f"{path} holds a private key, which must stay on the server; give the file that ends in .pub"
            )
        lines = [line.partition("#")[0].strip() for line in content.splitlines()]
        keys = [_parse_public_key(path, line) for line in lines if line]
        if not keys:
            raise InvalidKey(
                f"{path} holds no key; it must contain the lines of the .pub files of fedbus model keygen"
            )
        return cls({_key_id(key): key for key in keys})

    @property
    def key_ids(self) -> list[str]:
        return sorted(self._keys)

    def verify(self, task: str, ref: ModelRef, seal: ModelSignature | None) -> ModelSignature:
        """Return *seal* if a trusted key has signed this model of *task*.

        Raises SignatureMissing and SignatureInvalid.
        """
        model = f"version {ref.version} of {task}"
        if seal is None:
            raise SignatureMissing(
                f"{model} is not signed; only models signed by {self._key_names} are served here"
            )
        key = self._keys.get(seal.key)
        if key is None:
            raise SignatureInvalid(f"{model} is signed with the key {seal.key}; trusted is {self._key_names}")
        try:
            key.verify(seal.signature, _signed_payload(task, ref, seal.manifest))
        except InvalidSignature:
            raise SignatureInvalid(
                f"{model} has a signature that does not match this model; do not use it"
            ) from None
        return seal

    def verify_manifest(self, manifest: Manifest) -> ModelSignature:
        """Do the same as `check`, and verify that *manifest* did not change after it was signed."""
        seal = self.verify(manifest.task, manifest.ref, manifest.seal)
        if seal.manifest != compute_manifest_digest(manifest):
            raise SignatureInvalid(
                f"the manifest of version {manifest.version} of {manifest.task} was changed after it was signed"
            )
        return seal

    @property
    def _key_names(self) -> str:
        return " or ".join(self.key_ids)


def compute_manifest_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of *manifest* without its signature and without fields that have their default value.

    So a new field does not change the digest of a manifest that was signed before.
    """
    return hashlib.sha256(
        _canonical_json(manifest.model_dump(mode="json", exclude={"seal"}, exclude_defaults=True))
    ).hexdigest()


def _signed_payload(task: str, ref: ModelRef, digest: str) -> bytes:
    fields = {name: getattr(ref, name) for name in ModelRef.model_fields}
    body = _canonical_json({"task": task, "manifest": digest, **fields})
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE, len(body), body)


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _key_id(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_KEY_ID_CHARS]


def _format_key(key: Ed25519PublicKey) -> str:
    return f"{ALGORITHM} {base64.b64encode(key.public_bytes_raw()).decode()}"


def _parse_public_key(path: Path, line: str) -> Ed25519PublicKey:
    kind, _, text = line.partition(" ")
    try:
        key = base64.b64decode(text.strip(), validate=True) if kind == ALGORITHM else b""
        return Ed25519PublicKey.from_public_bytes(key)
    except ValueError:
        raise InvalidKey(
            f"{path} has a line that is no public key of fedbus model keygen, such as {ALGORITHM} MCowBQYDK2VwAyEA…: "
            f"{line[:40]!r}"
        ) from None


def _read_key_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidKey(f"{path} cannot be read: {error.strerror}") from error
