"""Health reports of this process to its supervisor: systemd, Docker or Kubernetes.

    FEDBUS_PULSE    health file, whose modification time is renewed while the event loop runs
    NOTIFY_SOCKET   set by systemd: receives READY, WATCHDOG and STOPPING (see sd_notify)

    python -m fedbus.app.entrypoints.health   exit with 0 if the health file is fresh, else with 1

The health check takes 30 ms and needs no port. If the event loop is blocked, the reports stop and the supervisor
restarts the process. A lost connection to NATS does not stop them: every agent reconnects by itself.
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
"""A process whose health file is older counts as stuck."""


@asynccontextmanager
async def report_health(every_s: float = INTERVAL_S) -> AsyncIterator[None]:
    """Report health from the event loop while the block runs, as the environment configures it."""
    file, systemd = os.environ.get(HEALTH_FILE_VARIABLE), os.environ.get(NOTIFY_SOCKET_VARIABLE)
    reports = asyncio.create_task(_report_forever(file, systemd, every_s), name="report health")
    try:
        yield
    finally:
        reports.cancel()
        await asyncio.wait([reports])
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


def _notify_systemd(address: str | None, state: str) -> None:
    """Send *state* to systemd; an *address* that starts with @ is an abstract socket."""
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def health_problem(file: Path, *, stale_s: float = STALE_S) -> str:
    """Describe why the process of the health file *file* is unhealthy; empty if it is healthy."""
    try:
        age_s = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return f"no health file {file} yet"
    return f"health file is {age_s:.0f} s old (limit {stale_s:g} s)" if age_s > stale_s else ""


def main() -> NoReturn:
    """Run the health check."""
    file = os.environ.get(HEALTH_FILE_VARIABLE)
    if not file:
        sys.exit(f"{HEALTH_FILE_VARIABLE} is not set. Set it to the health file of the agent")
    sys.exit(health_problem(Path(file)) or 0)


if __name__ == "__main__":
    main()
