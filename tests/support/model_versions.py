"""Weights, manifests and champions for tests of the model repository."""

import hashlib
from datetime import UTC, datetime

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest

WEIGHTS = b"weights of the first model"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(version: int, content: bytes = WEIGHTS, run: str | None = None) -> Manifest:
    return Manifest(
        task="mnist",
        version=version,
        sha256=digest(content),
        size_bytes=len(content),
        architecture=digest(b"architecture"),
        created=datetime.now(UTC),
        parent=version - 1 or None,
        run=run,
        participants={"c1": 20},
        metrics={"loss": 0.5},
    )


def champion(version: int, term: int, *before: int) -> Champion:
    return Champion(version=version, term=term, before=before, since=datetime.now(UTC))
