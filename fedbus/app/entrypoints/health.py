"""A sign of life for whoever keeps this process: systemd, Docker, Kubernetes.

    FEDBUS_PULSE    a file whose time is renewed every few seconds, for as long as the loop turns
    NOTIFY_SOCKET   systemd's own variable: told that we are ready, alive, and leaving

    python -m fedbus.app.entrypoints.health   is the file fresh? exit code 0 or 1: a health check in 30 ms, with no port

A loop that something blocks says nothing, and its supervisor starts the process anew. A bus that is
away is no reason for that: every agent waits for it, and would only wait again.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

HEALTH_FILE_VARIABLE: Final = "FEDBUS_PULSE"
NOTIFY_SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"
INTERVAL_S: Final = 5.0
STALE_S: Final = 30.0
"""So long without a sign, and the process counts as stuck."""


@asynccontextmanager
async def report_health(every_s: float = INTERVAL_S) -> AsyncIterator[None]:
    """Signs of life from the loop, to whom the environment names, for as long as the block runs."""
    file, systemd = os.environ.get(HEALTH_FILE_VARIABLE), os.environ.get(NOTIFY_SOCKET_VARIABLE)
    beating = asyncio.create_task(_report_forever(file, systemd, every_s), name="pulse")
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])
        _notify_systemd(systemd, "STOPPING=1")
        if file:
            _remove(file)


async def _report_forever(file: str | None, systemd: str | None, every_s: float) -> None:
    _notify_systemd(systemd, "READY=1")
    while file or systemd:
        if file:
            _touch(file)
        _notify_systemd(systemd, "WATCHDOG=1")
        await asyncio.sleep(every_s)


def _touch(file: str) -> None:
    Path(file).touch()


def _remove(file: str) -> None:
    Path(file).unlink(missing_ok=True)


def _notify_systemd(systemd: str | None, word: str) -> None:
    """One word to systemd; a name that begins with @ is of its abstract kind."""
    if systemd:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(word.encode(), systemd.replace("@", "\0", 1) if systemd.startswith("@") else systemd)


def health_problem(file: Path, *, stale_s: float = STALE_S) -> str:
    """What is wrong with the process whose pulse is in *file*; empty where it is well."""
    try:
        age_s = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return f"no sign of life in {file} yet"
    return f"the last sign of life is {age_s:.0f} s old" if age_s > stale_s else ""


def main() -> NoReturn:
    """The health check."""
    file = os.environ.get(HEALTH_FILE_VARIABLE)
    if not file:
        sys.exit(f"{HEALTH_FILE_VARIABLE} names no file: whom should I feel the pulse of?")
    sys.exit(health_problem(Path(file)) or 0)


if __name__ == "__main__":
    main()
