"""Runs the rounds on fedbus with default settings.

The processes are the embedded nats-server, which syncs each event to disk; the server side; each client with its
three agents; and the child processes of the ServerApp and the ClientApps.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks.rounds import APP, Case, SideFailed, seconds_of_rounds
from fedbus.app.local.stack import run_stack
from fedbus.app.settings import Settings
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.server import ServerClosed

WARMUP_ROUNDS: Final = 2
TIMEOUT_S: Final = 180.0
STAMPS: Final = "stamps"


async def run_rounds(case: Case, count: int, directory: Path) -> list[float]:
    """Start everything, run *count* rounds, and return their seconds."""
    async with start_run(case, count + WARMUP_ROUNDS, directory) as finished:
        await finished()
    return seconds_of_rounds(directory / STAMPS, skip=WARMUP_ROUNDS)


@asynccontextmanager
async def start_run(case: Case, count: int, directory: Path) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Start a federation in *directory* with a run of *count* rounds; yield a function that waits for its end."""
    os.environ.update(case.environment(directory / STAMPS))  # all processes inherit it
    settings = Settings(FEDBUS_HOME=directory, FEDBUS_FEDERATION="bench")
    options = ["--rounds", str(count), "--quorum", str(case.clients), "--every", "1s", "--at-most", "1"]
    async with (
        run_stack(settings, [str(APP)], clients=case.clients, server_options=options) as running,
        Bus.connect(running.nats.url, Identity(settings.fed, "bench")) as bus,
    ):
        await bus.create_streams()
        # transitions contain all rounds so far, so that reading them would add load to the measurement
        subject_filter = [subjects.wildcard_for(bus.fed, ServerClosed)]
        async with bus.read_stream(events_stream(bus.fed), subject_filter, whole=True) as closings:
            yield lambda: _wait_for_end(closings, running.home / "logs")


async def _wait_for_end(closings: AsyncIterator[StoredMessage], logs: Path) -> None:
    """Wait for the end of the run."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            closed = (await anext(closings)).message
    except TimeoutError:
        raise SideFailed(f"fedbus did not finish its rounds within {TIMEOUT_S:g} s; see {logs}") from None
    assert isinstance(closed, ServerClosed)
    if closed.outcome != "finished":
        raise SideFailed(f"the run of fedbus {closed.outcome}: {closed.reason}; see {logs}")
