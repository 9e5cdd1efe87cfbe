"""Free ports for servers of tests."""

import itertools
import os
import socket
from typing import Final

FIRST_PORT: Final = 20_000
PORTS_PER_WORKER: Final = 1_500
"""Ports of a worker; with eight workers they end below those that systems give away by themselves."""

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_next = itertools.cycle(
    range(FIRST_PORT + _worker * PORTS_PER_WORKER, FIRST_PORT + (_worker + 1) * PORTS_PER_WORKER)
)
for _ in range(os.getpid() % PORTS_PER_WORKER):
    next(_next)


def free_port() -> int:
    """A port that nobody has.

    The system would give one that was just given back, or give it to a connection before a server has come up on it:
    so two servers of a test got the same.
    """
    for port in itertools.islice(_next, PORTS_PER_WORKER):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("this worker has no port left")
