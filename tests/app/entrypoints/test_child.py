"""Child processes whose main thread belongs to the code of a task."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support import eventually

from fedbus.agents.common.child_process import ChildProcess

PROGRAM = """
import sys
from fedbus.app.entrypoints import child

sys.path.insert(0, sys.argv[1])
child.ENTRY_MODULES["server"] = "work"
child.main("server")
"""

WORK = """
import asyncio, os, signal, sys, threading, time
from fedbus.agents.common.asyncio_tools import wait_for_first

def app():
    {app}

async def main(stop, main_thread):
    main_thread.at_end(lambda: print("closed", flush=True))
    await wait_for_first(main_thread.run(app), stop.wait())
    print("stopped" if stop.is_set() else "finished", flush=True)
    return 7
"""


def write_work(path: Path, app: str) -> tuple[str, ...]:
    (path / "work.py").write_text(WORK.replace("{app}", app))
    return sys.executable, "-c", PROGRAM, str(path)


async def test_the_code_of_a_task_runs_in_the_main_thread(tmp_path: Path) -> None:
    app = "signal.signal(signal.SIGALRM, lambda *_: None); asyncio.get_event_loop(); asyncio.run(asyncio.sleep(0))"
    lines: list[str] = []
    async with ChildProcess("app", *write_work(tmp_path, app), output=lines.append) as child:
        assert await child.wait() == 7
    assert [line for line in lines if line in {"finished", "closed"}] == ["finished", "closed"]


@pytest.mark.parametrize(
    "app",
    [
        "print('up', flush=True); time.sleep(1000)",
        "print('up', flush=True); asyncio.run(asyncio.sleep(1000))",
        "print('up', flush=True); lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "signal.signal(signal.SIGTERM, lambda *_: None); print('up', flush=True); time.sleep(1000)",
    ],
    ids=["sleeps", "runs an event loop", "waits for a lock", "handles SIGTERM itself"],
)
async def test_sigterm_ends_a_process_whose_code_blocks(tmp_path: Path, app: str) -> None:
    lines: list[str] = []
    async with ChildProcess("app", *write_work(tmp_path, app), output=lines.append, stop_s=60) as child:
        await eventually(lambda: "up" in lines)
        os.kill(child.pid, signal.SIGTERM)
        assert await child.wait() == 7
    assert "stopped" in lines
    assert "closed" not in lines  # the code blocks, so nothing else can run in its thread


async def test_sigterm_to_a_forked_process_does_not_stop_its_parent(tmp_path: Path) -> None:
    app = (
        "pid = os.fork() or time.sleep(1000); os.kill(pid, signal.SIGTERM); _, status = os.waitpid(pid, 0); "
        "print('signal', os.WTERMSIG(status), flush=True); time.sleep(0.2)"
    )
    lines: list[str] = []
    async with ChildProcess("app", *write_work(tmp_path, app), output=lines.append) as child:
        assert await child.wait() == 7
    assert f"signal {signal.SIGTERM.value}" in lines
    assert "finished" in lines


async def test_an_error_of_the_entry_module_is_the_answer(tmp_path: Path) -> None:
    lines: list[str] = []
    async with ChildProcess(
        "app", *write_work(tmp_path, "raise ValueError('no\\nway')"), output=lines.append
    ) as child:
        assert await child.wait() == 1
    assert child.answer == "ValueError: no way"
    assert any("Traceback" in line for line in lines)
