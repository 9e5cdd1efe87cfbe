"""The composition of the dashboard: token, access, models, and the command that serves it."""

import asyncio
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import psutil
import pytest
from support import NatsServer, eventually
from support.processes import command_of
from support.simulated_federation import COMMIT, make_model_ref

from fedbus.app.composition.dashboard import Dashboard, load_token, trace_url_template
from fedbus.app.local.stack import run_stack
from fedbus.app.local.supervisor import PortTaken
from fedbus.app.settings import InvalidSetting, Settings
from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.models.open import open_model_store

OBSERVABILITY = Path(__file__).parents[3] / "deploy" / "observability"


def test_a_token_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a token of the file\n")
    assert load_token({}, None) == ""
    assert load_token({}, file) == "a token of the file"
    assert (
        load_token({"FEDBUS_GATEWAY_TOKEN": "a token of the environment"}, file)
        == "a token of the environment"
    )


def test_a_short_or_unreadable_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"6 characters \(minimum 16\)"):
        load_token({"FEDBUS_GATEWAY_TOKEN": "secret"}, None)
    with pytest.raises(InvalidSetting, match=r"FEDBUS_GATEWAY_TOKEN_FILE.*No such file"):
        load_token({}, tmp_path / "none")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"host": "::1"},
        {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "token": "0123456789abcdef", "certificate": Path("c"), "key": Path("k")},
    ],
)
def test_a_local_or_authenticated_dashboard_is_allowed(options: Any) -> None:
    Dashboard(Settings(), **options).check_access()


@pytest.mark.parametrize("options", [{}, {"token": "0123456789abcdef"}, {"certificate": Path("c")}])
def test_a_remote_dashboard_without_authentication_is_refused(options: Any) -> None:
    with pytest.raises(
        InvalidSetting,
        match=r"other machines can connect to 0\.0\.0\.0\. Set FEDBUS_GATEWAY_TOKEN, .*--insecure",
    ):
        Dashboard(Settings(), host="0.0.0.0", **options).check_access()


def test_a_trace_url_without_a_placeholder_is_of_grafana() -> None:
    assert trace_url_template("") == ""
    assert (
        trace_url_template("https://jaeger.example/trace/{trace_id}")
        == "https://jaeger.example/trace/{trace_id}"
    )
    url = urlsplit(trace_url_template("http://127.0.0.1:3000/").replace("{trace_id}", "4bf9"))
    assert (url.netloc, url.path) == ("127.0.0.1:3000", "/explore")
    (pane,) = json.loads(parse_qs(url.query)["panes"][0]).values()
    assert [one["query"] for one in pane["queries"]] == ["4bf9"]
    sources = (OBSERVABILITY / "provisioning" / "datasources" / "grafana-datasources.yaml").read_text()
    assert f"uid: {pane['datasource']}\n" in sources


async def test_the_versions_are_those_of_the_model_repository(tmp_path: Path) -> None:
    store = open_model_store(str(tmp_path / "models"), "mnist")
    await store.prepare()
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    model = make_model_ref(1).model_copy(update={"sha256": await store.put(weights), "size_bytes": 7})
    now = datetime.now(UTC)
    await store.publish(Manifest(**dict(model), task="mnist", created=now, code_version=COMMIT))
    await store.set_champion(Champion(version=1, term=1, since=now))
    facts = await Dashboard(Settings(home=tmp_path)).list_models("mnist")
    assert [one["version"] for one in facts["versions"]] == [1]
    assert facts["champion"]["version"] == 1
    assert facts["error"] == ""


async def test_an_unavailable_repository_is_reported_as_an_error(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("not a directory")
    facts = await Dashboard(Settings(home=tmp_path)).list_models("mnist")
    assert facts["versions"] == []
    assert facts["error"]


async def test_the_command_serves_the_dashboard_and_prints_its_url(nats: NatsServer, tmp_path: Path) -> None:
    environment = {**os.environ, "FEDBUS_NATS_URL": nats.url, "FEDBUS_HOME": str(tmp_path)}
    command = (sys.executable, "-m", "fedbus.app.cli.main", "gateway", "--port", "0")
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout
    try:
        async with asyncio.timeout(60):
            while not (line := await process.stdout.readline()).startswith(b"the dashboard is on "):
                assert line, "the command ended"
        url = line.decode().split()[-1]

        async def is_serving() -> bool:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/app.js") as response:
                return response.status == 200

        await eventually(is_serving)
    finally:
        process.terminate()
        assert await process.wait() == 0


async def test_a_stack_holds_the_port_of_its_dashboard(tmp_path: Path) -> None:
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path), "FEDBUS_GATEWAY_PORT": "0"})
    async with run_stack(settings, ["nowhere"], clients=0, dashboard=True) as running:
        port = int(running.dashboard.rpartition(":")[2])

        def is_taken() -> bool:
            try:
                socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                return True
            return False

        assert is_taken(), "before the gateway runs"

        async def is_serving() -> bool:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{running.dashboard}/app.js") as response,
            ):
                return response.status == 200

        await eventually(is_serving, within_s=60)
        (gateway,) = gateways()
        gateway.kill()
        await eventually(lambda: "gateway" in running.restarts)
        assert is_taken(), "while the gateway restarts"
        await eventually(is_serving, within_s=60)


def gateways() -> list[psutil.Process]:
    """The gateway processes of this process."""
    return [one for one in psutil.Process().children() if "gateway" in command_of(one)]


async def test_if_the_default_port_is_taken_another_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr("fedbus.app.local.stack.DEFAULT_DASHBOARD_PORT", listener.getsockname()[1])
        settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path)})
        async with run_stack(settings, ["nowhere"], clients=0, dashboard=True) as running:
            assert running.dashboard
            assert not running.dashboard.endswith(f":{listener.getsockname()[1]}")


async def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path), "FEDBUS_GATEWAY_PORT": port})
        with pytest.raises(PortTaken, match=f"port {port} is taken.*or set FEDBUS_GATEWAY_PORT"):
            async with run_stack(settings, ["nowhere"], clients=1, dashboard=True):
                pass
    assert not settings.nats_dir.exists()
