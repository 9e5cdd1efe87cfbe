"""Being asked to stop, by real signals to real processes."""

import os
import signal
import sys

from support import eventually

from fedbus.agents.common.child_process import ChildProcess

WORKS_FOREVER = """
import asyncio
from fedbus.app.entrypoints.signals import stop_on_signals

async def main():
    with stop_on_signals() as stop:
        print("up", flush=True)
        await stop.wait()
        print("asked", flush=True)
        if %r:
            await asyncio.Event().wait()
    print("done", flush=True)

asyncio.run(main())
"""


def run_worker(said: list[str], *, forever: bool) -> ChildProcess:
    return ChildProcess("worker", sys.executable, "-c", WORKS_FOREVER % forever, output=said.append)


async def test_asked_once_it_finishes_in_its_own_time() -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        said: list[str] = []
        async with run_worker(said, forever=False) as worker:
            await eventually(lambda said=said: "up" in said)  # type: ignore[misc]
            os.kill(worker.pid, how)
            assert await worker.ended() == 0
        assert said[-2:] == ["asked", "done"]


async def test_asked_twice_it_ends_at_once() -> None:
    said: list[str] = []
    async with run_worker(said, forever=True) as worker:
        await eventually(lambda: "up" in said)
        os.kill(worker.pid, signal.SIGINT)
        await eventually(lambda: "asked" in said)
        os.kill(worker.pid, signal.SIGINT)
        assert await worker.ended() == 130

    assert "stopping; press Ctrl-C again to end at once" in said
    assert "done" not in said
