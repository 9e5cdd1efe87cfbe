"""The parts of the library `flower-superlink` that need no process."""

import runpy
import tomllib
import zipfile
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.cli.config_utils import get_fab_metadata
from flwr.cli.install import install_from_fab
from flwr.common.config import parse_config_args
from flwr.superlink.grid import HttpGrid

from fedbus.contracts.run import RunPlan
from fedbus.contracts.task.superlink import SuperLinkTable
from fedbus.learning.flower.array_records import to_record
from fedbus.learning.flower.flower_version import UnsupportedFlower
from fedbus.learning.flower.library import FlowerLibrary
from fedbus.learning.flower.private_api import (
    NODE_UNAVAILABLE,
    build_message,
    set_message_id,
    set_process_identity,
)
from fedbus.learning.flower_superlink import child, private_api
from fedbus.learning.flower_superlink.bundle import build_bundle, to_toml
from fedbus.learning.flower_superlink.child import FleetOnly
from fedbus.learning.flower_superlink.flower_process import FlowerProcess
from fedbus.learning.flower_superlink.grid import SuperLinkGrid
from fedbus.learning.flower_superlink.library import SuperLinkLibrary
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.memory_bus import MemoryBus
from fedbus.learning.messenger import BusMessenger

CONFIG: dict[str, bool | int | float | str] = {
    "lr": 1e-05,
    "optimizer.momentum": 0.9,
    "optimizer.name": 'the "best" \\ one\n\x7f',
    "rounds": 3,
    "verbose": False,
}


def test_flower_installs_the_bundle(tmp_path: Path) -> None:
    bundle = build_bundle("my-task", CONFIG)
    assert get_fab_metadata(bundle) == ("fedbus/my-task", "1.0.0")
    installed = install_from_fab(bundle, install_dir=tmp_path)
    document = tomllib.loads((installed / "pyproject.toml").read_text(encoding="utf-8"))
    assert document["tool"]["flwr"]["app"]["config"]["optimizer"]["momentum"] == 0.9


def test_the_bundle_has_no_code_of_the_task() -> None:
    with zipfile.ZipFile(BytesIO(build_bundle("my-task", CONFIG))) as archive:
        assert set(archive.namelist()) == {"pyproject.toml", ".info/CONTENT"}


def test_equal_bundles_have_equal_bytes() -> None:
    assert build_bundle("my-task", CONFIG) == build_bundle("my-task", CONFIG)


def test_flower_reads_the_node_config_unchanged(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(to_toml(CONFIG), encoding="utf-8")
    assert parse_config_args([str(tmp_path / "node.toml")]) == CONFIG


@pytest.mark.parametrize(
    ("peer", "path", "status"),
    [
        ("127.0.0.1", "/v1/control/start-run", 200),
        ("::1", "/v1/runtime/acquire-task", 200),
        ("10.0.0.7", "/v1/fleet/pull-messages", 200),
        ("10.0.0.7", "/v1/control/start-run", 403),
        ("10.0.0.7", "/v1/runtime/acquire-task", 403),
        ("10.0.0.7", "/v1/fleet/../control/start-run", 403),
        ("10.0.0.7", "/docs", 403),
        (None, "/v1/control/start-run", 403),
    ],
)
async def test_other_machines_reach_only_the_fleet_api(peer: str | None, path: str, status: int) -> None:
    sent: list[Any] = []

    async def app(
        _scope: Any, _receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return None

    scope = {"type": "http", "path": path, "client": None if peer is None else (peer, 1)}
    await FleetOnly(app)(scope, receive, send)
    assert sent[0]["status"] == status


def test_the_default_superlink_is_for_this_machine_only() -> None:
    assert SuperLinkTable().bind_address == "127.0.0.1"
    assert SuperLinkTable(address="localhost").bind_address == "127.0.0.1"
    assert SuperLinkTable(address="server.lan").bind_address == "0.0.0.0"
    assert SuperLinkTable(address="server.lan", bind="10.0.0.1").bind_address == "10.0.0.1"


def test_a_missing_private_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpGrid, "_runtime_client")
    with pytest.raises(
        UnsupportedFlower, match=r"has no flwr\.\S+\.HttpGrid\._runtime_client, which fedbus uses"
    ):
        runpy.run_path(str(private_api.__file__))


async def test_a_supernode_that_ends_after_the_last_message_is_in_the_round() -> None:
    """For example between the training and an evaluation on the server, in the last round."""
    messenger = BusMessenger(MemoryBus(), task="tiny", run="r1", plan=RunPlan())
    unreported = {"c2": "the SuperNode ended: killed by SIGKILL"}
    nodes = SimpleNamespace(take_unreported=lambda: {name: unreported.pop(name) for name in list(unreported)})
    grid = SuperLinkGrid(*cast("tuple[Any, Any, Any, Any]", (None, messenger, None, nodes)))
    assert grid.tally(1).failures == {"c2": "the SuperNode ended: killed by SIGKILL"}
    assert grid.tally(2).failures == {}


def test_a_time_limit_of_zero_waits_for_no_reply() -> None:
    """As Flower's own Grid: the replies can be pulled later."""
    messenger = SimpleNamespace(clients=list, plan=RunPlan(round_s=60))
    nodes = SimpleNamespace(take_unreported=dict, client_of=str)
    http_grid = SimpleNamespace(
        push_messages=lambda messages: [f"m{number}" for number, _ in enumerate(messages)]
    )
    link = SimpleNamespace(check_running=lambda: None)
    grid = SuperLinkGrid(*cast("tuple[Any, Any, Any, Any]", (http_grid, messenger, link, nodes)))
    set_process_identity(1)
    assert grid.send_and_receive([Message(RecordDict(), 1, "query")], timeout=0) == []


def test_apps_are_those_of_the_library_flower() -> None:
    library = open_library("flower-superlink")
    assert isinstance(library, SuperLinkLibrary)
    assert isinstance(library, FlowerLibrary)


@pytest.mark.parametrize(
    ("lines", "end", "reason"),
    [
        (["INFO :      Starting"], "os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        (
            ["WARNING : low memory", "t INFO [uvicorn.access] POST"],
            "os.kill(os.getpid(), 9)",
            "killed by SIGKILL: WARNING : low memory",
        ),
        (["INFO :      Starting", "ERROR : no key"], "os._exit(3)", "exit code 3: ERROR : no key"),
        (["INFO :      Starting"], "os._exit(3)", "exit code 3: INFO : Starting"),
        ([], "os._exit(3)", "exit code 3"),
    ],
)
def test_an_exit_is_described_by_the_lines_that_report_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], end: str, reason: str
) -> None:
    printing = "".join(f"print({line!r}, flush=True)\n" for line in lines)
    (tmp_path / "program.py").write_text(f"import os\n{printing}{end}\n", encoding="utf-8")
    monkeypatch.setattr(child, "__name__", "program")
    environment = {"PYTHONPATH": str(tmp_path)}
    with FlowerProcess("superlink", [], directory=tmp_path, environment=environment) as process:
        assert process.wait(30)
        assert process.describe_exit() == reason


def make_message(values: np.ndarray[Any, Any], number: int) -> Message:
    message = Message(RecordDict({"arrays": to_record({"w": values})}), 1, "train")
    set_message_id(message, f"m{number}")
    return message


class GridParts:
    """A grid of the client ``c1``, whose SuperLink returns *replies*."""

    def __init__(self) -> None:
        self.rejected: list[str] = []
        self.replies: list[Message] = []
        self.lost: dict[int, str] = {}
        """Why SuperNodes have ended, by node id."""
        messenger = SimpleNamespace(
            clients=list,
            plan=RunPlan(round_s=60),
            accept=lambda *_, **__: None,
            reject=lambda _, reason: self.rejected.append(reason),
        )
        nodes = SimpleNamespace(
            take_unreported=dict, client_of=lambda _: "c1", failures_of=lambda _: self.lost
        )
        http_grid = SimpleNamespace(
            run=SimpleNamespace(run_id=1),
            push_messages=lambda messages: [message.metadata.message_id for message in messages],
            pull_messages=lambda _: self.replies,
        )
        link = SimpleNamespace(check_running=lambda: None)
        self.grid = SuperLinkGrid(*cast("tuple[Any, Any, Any, Any]", (http_grid, messenger, link, nodes)))
        set_process_identity(1)


def test_why_a_supernode_ended_replaces_the_error_for_a_silent_one() -> None:
    parts = GridParts()
    metadata = Metadata(1, "r1", 1, 1, "m1", "", 0.0, 60.0, "train")
    parts.replies[:] = [build_message(metadata, error=Error(NODE_UNAVAILABLE, "no heartbeat"))]
    parts.lost[1] = "the SuperNode ended: killed by SIGKILL"
    (reply,) = parts.grid.send_and_receive([make_message(np.zeros(2), 1)])
    assert reply.has_error()
    assert parts.rejected == ["c1: the SuperNode ended: killed by SIGKILL"]


def test_bad_updates_are_failures_of_their_client_in_each_round() -> None:
    parts = GridParts()
    parts.grid.checks_updates = True
    updates = [
        to_record({"w": np.ones(2)}),
        to_record({"w": np.array([0.0, np.nan])}),
        to_record({"w": np.ones(3)}),
        ArrayRecord({"w": Array("float64", (2,), "fedbus.int8", b"1")}),
    ]
    for number, update in enumerate(updates):
        metadata = Metadata(1, "r1", 1, 1, f"m{number}", "", 0.0, 60.0, "train")
        parts.replies[:] = [build_message(metadata, content=RecordDict({"arrays": update}))]
        (reply,) = parts.grid.send_and_receive([make_message(np.zeros(2), number)])
        assert reply.has_error() == (number > 0)
    assert parts.rejected == [
        "c1: invalid reply: the array 'w' has NaN or infinity",
        "c1: invalid reply: the array 'w' has the shape (3,) instead of (2,)",
        "c1: invalid reply: compressed array 'w': 1 bytes instead of 6",
    ]
