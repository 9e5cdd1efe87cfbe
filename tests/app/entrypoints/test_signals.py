"""Graceful shutdown by real signals to real processes."""

import os
import signal
import sys

from support import eventually

from fedbus.agents.common.child_process import ChildProcess

WORKER = """
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


def run_worker(output: list[str], *, forever: bool) -> ChildProcess:
    return ChildProcess("worker", sys.executable, "-c", WORKER % forever, output=output.append)


async def test_one_signal_lets_the_process_finish() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        output: list[str] = []
        async with run_worker(output, forever=False) as worker:
            await eventually(lambda output=output: "up" in output)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
            os.kill(worker.pid, number)
            assert await worker.wait() == 0
        assert output[-2:] == ["asked", "done"]


async def test_a_second_signal_ends_the_process_at_once() -> None:
    output: list[str] = []
    async with run_worker(output, forever=True) as worker:
        await eventually(lambda: "up" in output)
        os.kill(worker.pid, signal.SIGINT)
        await eventually(lambda: "asked" in output)
        os.kill(worker.pid, signal.SIGINT)
        assert await worker.wait() == 130

    assert "stopping; press Ctrl-C again to end at once" in output
    assert "done" not in output
