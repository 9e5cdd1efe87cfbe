"""Flower's numeric ids of nodes and runs, derived from fedbus names and so equal in every process."""

import hashlib


def node_id(client: str) -> int:
    """Return Flower's node id of *client*, an integer in 2…2⁶³-1."""
    return _numeric_id("node", client)


def run_number(run: str) -> int:
    """Return Flower's run id of *run*, an integer in 2…2⁶³-1."""
    return _numeric_id("run", run)


def _numeric_id(kind: str, name: str) -> int:
    digest = hashlib.sha256(f"{kind}:{name}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") & (2**63 - 1)
    return max(number, 2)  # Flower reserves 1 for the server and 0 for no node
