"""The rounds on fedbus as it is: the embedded nats-server that syncs each event, a process for the server
side, one for each client with its three agents, the child processes of ServerApp and ClientApps.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from benchmarks.rounds import APP, Case, SideFailed, seconds_of_rounds
from fedbus.app.settings import Settings
from fedbus.app.stack import Stack, stack
from fedbus.bus.bus import Bus, Identity, Seen
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.server import ServerClosed

SKIP: Final = 2
LONGEST_S: Final = 180.0


async def rounds(case: Case, count: int, directory: Path) -> list[float]:
    """The seconds of *count* rounds; everything is started and ended here."""
    stamps = directory / "stamps"
    os.environ.update(case.environment(stamps))  # handed on to every process
    settings = Settings(FEDBUS_HOME=directory, FEDBUS_FEDERATION="bench")
    options = ["--rounds", str(count + SKIP), "--quorum", str(case.clients)]
    options += ["--every", "1s", "--at-most", "1"]
    async with (
        stack(settings, [str(APP)], clients=case.clients, server_options=options) as running,
        Bus.connect(running.nats.url, Identity(settings.fed, "bench")) as bus,
    ):
        await bus.make_streams()
        # not its transitions: each tells of all rounds so far, which is work for the machine that is measured
        wanted = [subjects.every(bus.fed, ServerClosed)]
        async with bus.watch(events_stream(bus.fed), wanted, whole=True) as closings:
            await _finished(closings, running)
    return seconds_of_rounds(stamps, skip=SKIP)


async def _finished(closings: AsyncIterator[Seen], running: Stack) -> None:
    """Wait for the end of the run."""
    logs = running.home / "logs"
    try:
        async with asyncio.timeout(LONGEST_S):
            closed = (await anext(closings)).message
    except TimeoutError:
        raise SideFailed(
            f"fedbus did not come to the end of its rounds in {LONGEST_S:g} s; see {logs}"
        ) from None
    assert isinstance(closed, ServerClosed)
    if closed.outcome != "finished":
        raise SideFailed(f"the run of fedbus {closed.outcome}: {closed.reason}; see {logs}")
