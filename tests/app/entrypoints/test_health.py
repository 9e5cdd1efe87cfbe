"""Health reports in a file, and to systemd on a real socket."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import eventually

from fedbus.app.entrypoints.health import health_problem, report_health


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBUS_PULSE", str(tmp_path / "pulse"))
    return tmp_path / "pulse"


async def test_a_running_loop_renews_the_health_file(file: Path) -> None:
    async with report_health(every_s=0.01):
        await eventually(file.exists)
        os.utime(file, (0, 0))
        await eventually(lambda: health_problem(file) == "")


async def test_a_stopped_process_has_no_health_file(file: Path) -> None:
    async with report_health():
        await eventually(file.exists)
    assert health_problem(file) == f"no health file {file} yet"


def test_an_old_health_file_is_a_problem(file: Path) -> None:
    file.touch()
    os.utime(file, (time.time() - 100,) * 2)
    assert health_problem(file) == "health file is 100 s old (limit 30 s)"


@pytest.mark.parametrize(("fresh", "code"), [(True, 0), (False, 1)])
def test_the_health_check_is_an_exit_code(file: Path, fresh: bool, code: int) -> None:
    if fresh:
        file.touch()
    check = subprocess.run(
        [sys.executable, "-m", "fedbus.app.entrypoints.health"], capture_output=True, check=False
    )
    assert check.returncode == code


async def test_systemd_is_notified_of_ready_watchdog_and_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with report_health():
            loop = asyncio.get_running_loop()
            assert [await loop.sock_recv(systemd, 99) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
        assert systemd.recv(99) == b"STOPPING=1"
