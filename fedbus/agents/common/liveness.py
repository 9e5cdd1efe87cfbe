"""Which agents run on this device: each holds a lock for as long as it lives, and the kernel lets go of it.

    with present(directory, "inference"): ...
    agents_in(directory)  →  {"inference": True, "flower-client": False}

However an agent ends, killed or cut off from power, its lock ends with it: no heartbeat, no list of processes.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

LOCK_SUFFIX: Final = ".alive"


@contextmanager
def hold_liveness_lock(directory: Path, agent: str) -> Iterator[None]:
    """For as long as the block runs, *agent* is seen to be alive. Two of one name are seen as one."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{agent}{LOCK_SUFFIX}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def read_agent_liveness(directory: Path) -> dict[str, bool]:
    """Every agent that was ever here, and whether it is now."""
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
