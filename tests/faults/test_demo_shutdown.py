"""Ctrl-C or SIGKILL at any moment of `fedbus demo` ends all its processes."""

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
    "start": "fedbus demo",
    "first model": "model_init",
    "recruiting": "recruiting",
    "round": "round 1",
    "publishing": "publishing",
}


@asynccontextmanager
async def run_demo_process(directory: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """Run `fedbus demo` as a shell starts it; yield the process and its output file."""
    task, output_file = tiny_task(directory), directory / "output.txt"
    home = directory / "home"
    with output_file.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-u", "-m", "fedbus.app.cli.main", "demo", "--task", task.path, "--runs", "3",
            "--plot", str(directory / "loss.png"),
            env={**os.environ, "FEDBUS_HOME": str(home)}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process, output_file
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for remaining in processes_of(home):
            remaining.kill()


@pytest.mark.fault
@pytest.mark.parametrize("moment", MOMENTS)
async def test_ctrl_c_ends_every_process(tmp_path: Path, moment: str) -> None:
    async with run_demo_process(tmp_path) as (process, output_file):
        await eventually(lambda: MOMENTS[moment] in output_file.read_text(), within_s=60)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(ENDS_WITHIN_S):
            exit_code = await process.wait()
        assert processes_of(tmp_path / "home") == []
        assert exit_code == 130, output_file.read_text()[-2000:]
        assert "Traceback" not in output_file.read_text()


@pytest.mark.fault
async def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    async with run_demo_process(tmp_path) as (process, output_file):
        await eventually(lambda: "round 1" in output_file.read_text(), within_s=60)
        process.kill()
        await process.wait()
        await eventually(lambda: processes_of(tmp_path / "home") == [], within_s=ENDS_WITHIN_S)
