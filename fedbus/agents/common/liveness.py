"""Liveness of the agents on this device: each agent holds a file lock while it runs.

    with hold_liveness_lock(directory, "inference"): ...
    read_agent_liveness(directory)  →  {"inference": True, "flower-client": False}

The kernel releases the lock however the process ends, so neither heartbeats nor a list of processes are needed.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

LOCK_SUFFIX: Final = ".alive"


@contextmanager
def hold_liveness_lock(directory: Path, agent: str) -> Iterator[None]:
    """Mark *agent* as alive for the duration of the block. Two agents of one name count as one."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{agent}{LOCK_SUFFIX}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def read_agent_liveness(directory: Path) -> dict[str, bool]:
    """Return every agent that has ever run on this device, and whether it is alive."""
    return {
        path.name.removesuffix(LOCK_SUFFIX): _is_locked(path)
        for path in sorted(directory.glob(f"*{LOCK_SUFFIX}"))
    }


def _is_locked(path: Path) -> bool:
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
