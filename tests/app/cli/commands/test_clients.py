"""`fedbus clients`: the state of each client, from the lifecycle stream and the last device reports."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer, eventually
from support.cli import FedbusCli
from support.simulated_federation import COMMIT, TASK, SimulatedFederation, make_model_ref
from support.terminal import open_terminal

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import ClientData, InferenceData
from fedbus.contracts.device import DeviceReport, GpuUse
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.serving import DataChecked, LiveAccuracy

FED = FederationId("dev")


@pytest.fixture
def fedbus(tmp_path: Path, nats: NatsServer) -> FedbusCli:
    return FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus)


def make_report(client: str, cpu: float = 0.25, **more: object) -> DeviceReport:
    known = {"task": TASK, "client": client, "cpu": cpu, "memory": 0.5, "disk": 0.75}
    return DeviceReport.model_validate(known | more)


# --- the model -------------------------------------------------------------------------------------


async def test_the_listed_model_is_the_one_that_serves(
    fedbus: FedbusCli, simulation: SimulatedFederation
) -> None:
    await simulation.create_clients(["c1"], version=1)
    tried = ClientData(task=TASK, client="c1", model=make_model_ref(2), code_version=COMMIT)
    await simulation.transition(tried, "model_published", "serving", "pending_application")
    (one,) = (await fedbus("clients", "ls", "--json")).facts
    assert (one["state"], one["model_version"], one["sha256"]) == (
        "pending_application",
        1,
        make_model_ref(1).sha256,
    )
    assert "serves v1 at http://" in (await fedbus("clients", "show", "c1")).out
    back = InferenceData(task=TASK, client="c1", endpoint="http://127.0.0.1:8080")
    await simulation.transition(back, "restarted", "serving", "empty")
    (one,) = (await fedbus("clients", "ls", "--json")).facts
    assert one["model_version"] is None
    assert "serves nothing" in (await fedbus("clients", "show", "c1")).out


async def test_a_narrow_terminal_omits_columns_and_cuts_none(
    fedbus: FedbusCli, simulation: SimulatedFederation
) -> None:
    await simulation.create_clients(["c1"], version=1)
    always = {"client", "state", "training", "inference", "model", "since"}
    for columns, spare in ((60, set[str]()), (200, {"contribution", "endpoint", "failed"})):
        async with open_terminal("clients", "ls", environment=fedbus.environment, columns=columns) as shown:
            async with asyncio.timeout(60):
                assert await shown.process.wait() == 0
            await eventually(lambda shown=shown: len(shown.lines) > 2)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
        headings = set(shown.lines[0].split())
        assert headings >= always | spare
        assert ("endpoint" in headings) is (columns == 200)
        assert ("the terminal is too narrow for endpoint" in shown.text) is (columns == 60)
        assert "…" not in shown.text


async def test_show_prints_the_live_accuracy_of_each_version(
    fedbus: FedbusCli, simulation: SimulatedFederation
) -> None:
    await simulation.create_clients(["c1", "c2"])
    live = tuple(LiveAccuracy(version=one, labelled=80, right=20 * one) for one in (1, 2))
    await simulation.publish(DataChecked(task=TASK, client="c1", rows=200, serving=2, live=live))
    shown = await fedbus("clients", "show", "c1")
    assert "live accuracy: v2 50.0% of 80, v1 25.0% of 80\n" in shown.out
    assert "no labelled predictions" in (await fedbus("clients", "show", "c2")).out


async def test_reported_text_is_printed_without_control_characters(
    fedbus: FedbusCli, simulation: SimulatedFederation
) -> None:
    hostile = "[/] \x1b]0;owned\x07\x1b[2J\x9b31m"
    await simulation.create_clients(["c1"])
    inference = InferenceData(task=TASK, client="c1", model=make_model_ref(1), endpoint=f"http://{hostile}")
    await simulation.transition(inference, "model_loaded", "updating", "serving", hostile)
    await simulation.publish(make_report("c1", errors=1, last_error=hostile, agents={hostile: False}))
    for command in ("show c1", "ls", "ls --wide", "ls --json"):
        shown = (await fedbus("clients", *command.split())).out
        assert all(line.isprintable() for line in shown.splitlines()), command
        assert "[/]" in shown, command


# --- devices ---------------------------------------------------------------------------------------


async def test_the_last_device_report_is_shown(fedbus: FedbusCli, simulation: SimulatedFederation) -> None:
    await simulation.create_clients(["c1", "c2"])
    gpu = GpuUse(name="orin", utilization=0.4)
    for cpu in (0.99, 0.25):
        await simulation.publish(
            make_report("c1", cpu, temperature_c=61.4, gpus=(gpu,), agents={"inference": False})
        )
    wide = (await fedbus("clients", "ls", "--wide")).out.splitlines()
    assert wide[0].split()[-7:] == ["cpu", "memory", "disk", "heat", "gpu", "errors", "reported"]
    assert "25%  50%     75%   61 °C  40%" in wide[1]
    assert "%" not in wide[2]
    assert "cpu" not in (await fedbus("clients", "ls")).out
    shown = (await fedbus("clients", "show", "c1")).out
    assert "cpu 25%, memory 50%, disk 75%, heat 61 °C, gpu 40%, inference is not running" in shown
    assert "device: no report yet" in (await fedbus("clients", "show", "c2")).out
    first, second = (await fedbus("clients", "ls", "--json")).facts
    assert (first["device"]["cpu"], second["device"]) == (0.25, None)


async def test_one_report_per_device_and_no_heartbeat_is_stored(simulation: SimulatedFederation) -> None:
    for number in range(1, 4):
        for _ in range(3):
            await simulation.publish(make_report(f"c{number}"))
    reports = await simulation.bus.last_per_device(DeviceReport)
    assert sorted(stored.subject.split(".")[3] for stored in reports) == ["c1", "c2", "c3"]
    assert (await simulation.bus.list_streams() or {})["FEDBUS_dev_DEVICES"] == 3
