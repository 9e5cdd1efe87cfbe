"""NKeys of NATS: ed25519 keys in base 32, whose first letters name their type.

The seed is the private key. It is stored in a file of mode 600, and no repr shows it.
"""

import base64
import os
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

import nkeys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedbus.app.failures import CliError, ExitCode
from fedbus.common.filesystem import atomic_write

SECRET_MODE: Final = 0o600


class KeyType(IntEnum):
    """The type of a key. A public key begins with its letter, a seed with S and the letter."""

    OPERATOR = nkeys.PREFIX_BYTE_OPERATOR
    ACCOUNT = nkeys.PREFIX_BYTE_ACCOUNT
    USER = nkeys.PREFIX_BYTE_USER

    @property
    def letter(self) -> str:
        return self.name[0]


class Key:
    """A key pair."""

    def __init__(self, seed: str) -> None:
        self._pair = nkeys.from_seed(bytearray(seed.encode()))
        self._seed = seed
        self.public: str = bytes(self._pair.public_key).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"Key({self.public})"

    @classmethod
    def generate(cls, of: KeyType) -> Self:
        return cls(bytes(nkeys.encode_seed(os.urandom(32), of)).decode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the seed in *path*.

        Raises:
            CliError: The file cannot be read, or has no seed.

        """
        try:
            return cls(path.read_text().strip())
        except (OSError, ValueError, nkeys.NkeysError) as error:
            reason = getattr(error, "strerror", None) or "the file has no key"
            raise CliError(f"cannot read the key {path}: {reason}", ExitCode.NOT_FOUND) from None

    def save(self, path: Path) -> None:
        write_secret(path, f"{self._seed}\n")

    def sign(self, text: str) -> bytes:
        signature: bytes = self._pair.sign(text.encode())
        return signature

    def render_credentials(self, jwt: str) -> str:
        """Render a credentials file with *jwt* and this key."""
        return render_credentials(jwt, self._seed)


def render_credentials(jwt: str, seed: str) -> str:
    """Render a credentials file; with an empty *seed*, without the key."""
    jwt_block = f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n"
    seed_block = f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    return f"{jwt_block}\n{seed_block}" if seed else jwt_block


def check_public_key(text: str) -> str:
    """Return *text* if it is the public key of a user.

    Raises:
        CliError: It is not.

    """
    if text.startswith("SU"):
        raise CliError(
            "this is the private seed. Keep it secret, and send the public key, which begins with U",
            ExitCode.USAGE,
        )
    if not _is_public_key(text):
        raise CliError(
            f"{text!r} is not the public key of a user. It begins with U; see: fedbus provision key",
            ExitCode.USAGE,
        )
    return text


def _is_public_key(text: str) -> bool:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError:
        return False
    checksum = int.from_bytes(raw[-2:], "little")
    return len(raw) == 35 and raw[0] == KeyType.USER and nkeys.crc16(bytearray(raw[:-2])) == checksum


def public_bytes(public: str) -> bytes:
    """Return the 32 bytes of a public key.

    Raises:
        ValueError: *public* is not in base 32.

    """
    return base64.b32decode(public + "=" * (-len(public) % 8))[1:-2]


def verify_signature(public: str, content: bytes, signature: bytes) -> bool:
    """Return whether the key *public* has signed *content*."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_bytes(public)).verify(signature, content)
    except (ValueError, InvalidSignature):
        return False
    return True


def write_secret(path: Path, text: str) -> None:
    """Write a secret atomically, with mode 600 from the beginning."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(path, text, mode=SECRET_MODE)
