"""Flower counts nodes and runs; fedbus names them. The number is made of the name, so it is the same everywhere."""

import hashlib


def node_id(client: str) -> int:
    """The number by which Flower knows *client*: positive, and small enough for a signed 64-bit field."""
    return _number("node", client)


def run_number(run: str) -> int:
    """The number by which Flower knows *run*."""
    return _number("run", run)


def _number(kind: str, name: str) -> int:
    digest = hashlib.sha256(f"{kind}:{name}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") & (2**63 - 1)
    return max(number, 2)  # 1 is Flower's own number for its server, 0 for nobody
