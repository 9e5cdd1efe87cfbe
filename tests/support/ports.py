"""Free ports for servers of tests."""

import itertools
import os
import socket
from typing import Final

FIRST_PORT: Final = 20_000
PORTS_PER_WORKER: Final = 1_500
"""Ports for each xdist worker. With eight workers, all are below the ephemeral ports of Linux."""

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_next = itertools.cycle(
    range(FIRST_PORT + _worker * PORTS_PER_WORKER, FIRST_PORT + (_worker + 1) * PORTS_PER_WORKER)
)
for _ in range(os.getpid() % PORTS_PER_WORKER):
    next(_next)


def free_port() -> int:
    """A port that no process uses.

    An ephemeral port of the system is not enough: the system may assign it to a connection before the server starts,
    or assign a port twice.
    """
    for port in itertools.islice(_next, PORTS_PER_WORKER):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port for this worker")
