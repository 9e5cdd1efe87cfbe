"""Keys of the kind that NATS knows people by: ed25519, spelled in base 32 with a letter for what they are of.

A seed is a secret: it goes from the system's randomness to a file of mode 600, and no repr shows it.
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

SECRET_MODE: Final = 0o600


class KeyType(IntEnum):
    """What a key is of. Public keys begin with the letter, seeds with S and the letter."""

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
    def new(cls, of: KeyType) -> Self:
        return cls(bytes(nkeys.encode_seed(os.urandom(32), of)).decode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The key in *path*; raises Failure."""
        try:
            return cls(path.read_text().strip())
        except (OSError, ValueError, nkeys.NkeysError) as error:
            why = getattr(error, "strerror", None) or "it holds no key"
            raise CliError(f"{path} cannot be used: {why}", ExitCode.NOT_FOUND) from None

    def save(self, path: Path) -> None:
        write_secret(path, f"{self._seed}\n")

    def sign(self, text: str) -> bytes:
        signature: bytes = self._pair.sign(text.encode())
        return signature

    def credentials(self, jwt: str) -> str:
        """The content of a credentials file: who one is, and this key to prove it."""
        return render_credentials(jwt, self._seed)


def render_credentials(jwt: str, seed: str) -> str:
    """The content of a credentials file; without a *seed* it waits for the device's own."""
    who = f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n"
    proof = f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    return f"{who}\n{proof}" if seed else who


def check_public_key(text: str) -> str:
    """*text*, if it is the public key of a user; raises Failure."""
    if text.startswith("SU"):
        raise CliError("that is the secret seed: never send it; the public key begins with U", ExitCode.USAGE)
    if not _is_public_key(text):
        raise CliError(
            f"{text!r} is no public key of a user: it begins with U, see: fedbus provision key",
            ExitCode.USAGE,
        )
    return text


def _is_public_key(text: str) -> bool:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError:
        return False
    sum_at_end = int.from_bytes(raw[-2:], "little")
    return len(raw) == 35 and raw[0] == KeyType.USER and nkeys.crc16(bytearray(raw[:-2])) == sum_at_end


def public_bytes(public: str) -> bytes:
    """The 32 bytes of a public key; raises ValueError."""
    return base64.b32decode(public + "=" * (-len(public) % 8))[1:-2]


def verify_signature(public: str, said: bytes, signature: bytes) -> bool:
    """Whether the key *public* has signed *said*."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_bytes(public)).verify(signature, said)
    except (ValueError, InvalidSignature):
        return False
    return True


def write_secret(path: Path, text: str) -> None:
    """Whole or not at all, and never for a moment readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_MODE), "w") as file:  # noqa: PTH123 (its mode from the first moment on)
        file.write(text)
    part.replace(path)
