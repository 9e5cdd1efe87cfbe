"""Ctrl-C, and worse, at any moment of the demonstration: everything ends, and nobody is left behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support import eventually
from support.federation import tiny_task
from support.processes import processes_of

ENDS_WITHIN_S = 10
MOMENTS = {
    "at once": "fedbus demo",
    "while the first model is made": "model_init",
    "while it recruits": "recruiting",
    "in a round": "round 1",
    "while a version is published": "publishing",
}


@asynccontextmanager
async def run_demo_process(directory: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """`fedbus demo` as a shell starts it, and the file with what it says."""
    task, said = tiny_task(directory), directory / "said.txt"
    home = directory / "home"
    with said.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-u", "-m", "fedbus.app.cli.main", "demo", "--task", task.path, "--runs", "3",
            "--plot", str(directory / "loss.png"),
            env={**os.environ, "FEDBUS_HOME": str(home)}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process, said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for left in processes_of(home):
            left.kill()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("in a round"),
        *(pytest.param(moment, marks=pytest.mark.fault) for moment in MOMENTS if moment != "in a round"),
    ],
)
async def test_ctrl_c_ends_every_process(tmp_path: Path, moment: str) -> None:
    async with run_demo_process(tmp_path) as (process, said):
        await eventually(lambda: MOMENTS[moment] in said.read_text(), within_s=60)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(ENDS_WITHIN_S):
            code = await process.wait()
        assert processes_of(tmp_path / "home") == []
        assert code == 130, said.read_text()[-2000:]
        assert "Traceback" not in said.read_text()


@pytest.mark.fault
async def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    async with run_demo_process(tmp_path) as (process, said):
        await eventually(lambda: "round 1" in said.read_text(), within_s=60)
        process.kill()
        await process.wait()
        await eventually(lambda: processes_of(tmp_path / "home") == [], within_s=ENDS_WITHIN_S)
