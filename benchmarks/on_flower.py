"""Runs the rounds on Flower's deployment with default settings: a SuperLink, a SuperNode per client, `flwr run`."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from benchmarks.rounds import APP, Case, SideFailed, read_stamps, seconds_of_rounds
from fedbus.agents.common.child_process import ChildProcess, describe_exit, log_tail
from fedbus.app.local import orphan_guard
from fedbus.app.local.supervisor import find_free_port

WARMUP_ROUNDS: Final = 1
TIMEOUT_S: Final = 180.0
POLL_S: Final = 0.2
HOST: Final = "127.0.0.1"
BIN: Final = Path(sys.executable).parent
CONNECTION: Final = """\
[superlink]
default = "bench"

[superlink.bench]
address = "{address}"
insecure = true
"""


async def run_rounds(case: Case, count: int, directory: Path, *, poll_s: float | None = None) -> list[float]:
    """Start everything, run *count* rounds, and return their seconds.

    *poll_s* replaces Flower's poll interval of one second.
    """
    stamps, port = directory / "stamps", find_free_port()
    environment = _environment(directory, port) | case.environment(stamps)
    if poll_s is not None:
        environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(poll_s)
    async with AsyncExitStack() as processes:
        link = await processes.enter_async_context(_superlink(directory, port, environment))
        for number in range(case.clients):
            await processes.enter_async_context(_supernode(number, directory, port, environment))
        await _submit(count + WARMUP_ROUNDS, directory, environment)
        await _wait_for_rounds(count + WARMUP_ROUNDS, stamps, link, directory)
    return seconds_of_rounds(stamps, skip=WARMUP_ROUNDS)


@asynccontextmanager
async def _superlink(
    directory: Path, port: int, environment: Mapping[str, str]
) -> AsyncIterator[ChildProcess]:
    options = ("--insecure", "--disable-runtime-dependency-installation", "--host", HOST, "--port", str(port))
    log = directory / "superlink.log"
    async with (
        _program("flower-superlink", *options, log=log, env=environment) as link,
        _kill_descendants(link),
    ):
        await _wait_for_port(port, link, directory)
        yield link


@asynccontextmanager
async def _kill_descendants(link: ChildProcess) -> AsyncIterator[None]:
    """End the child processes of the SuperLink first: they have their own sessions and would survive it."""
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(link.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def _supernode(number: int, directory: Path, port: int, environment: Mapping[str, str]) -> ChildProcess:
    options = ("--insecure", "--superlink", f"{HOST}:{port}", "--host", HOST, "--port", str(find_free_port()))
    return _program("flower-supernode", *options, log=directory / f"supernode-{number}.log", env=environment)


async def _submit(count: int, directory: Path, environment: Mapping[str, str]) -> None:
    """Submit the app to the SuperLink."""
    config, log = f"num-server-rounds={count}", directory / "run.log"
    command = ("run", str(APP), "bench", "--run-config", config)
    async with _program("flwr", *command, log=log, env=environment) as run:
        if (code := await run.wait()) != 0:
            raise SideFailed(f"`flwr run` {describe_exit(code)}: {log_tail(log)}")


async def _wait_for_rounds(count: int, stamps: Path, link: ChildProcess, directory: Path) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while len(read_stamps(stamps)) < count + 1:
                await _check_running(link, directory)
    except TimeoutError:
        log = directory / "superlink.log"
        raise SideFailed(
            f"Flower did not finish its rounds within {TIMEOUT_S:g} s: {log_tail(log)}"
        ) from None


async def _wait_for_port(port: int, link: ChildProcess, directory: Path) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            await _check_running(link, directory)
        else:
            writer.close()
            return


async def _check_running(link: ChildProcess, directory: Path) -> None:
    await asyncio.sleep(POLL_S)
    if link.returncode is not None:
        exit_text = describe_exit(link.returncode)
        raise SideFailed(f"the SuperLink {exit_text}: {log_tail(directory / 'superlink.log')}")


def _program(name: str, *options: str, log: Path, env: Mapping[str, str]) -> ChildProcess:
    """Start a program of Flower that ends with the block and with this process."""
    return ChildProcess(
        name, *orphan_guard.wrapper_command(), str(BIN / name), *options, environment=env, output=log
    )


def _environment(directory: Path, port: int) -> dict[str, str]:
    home = directory / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(address=f"{HOST}:{port}"))
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its own programs by name
    }
