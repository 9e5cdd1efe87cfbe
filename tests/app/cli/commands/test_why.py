"""`fedbus why`: the state of a client and its declined runs, from the streams alone."""

from pathlib import Path

from support import NatsServer, eventually
from support.cli import FedbusCli

from fedbus.app.cli.commands.why import STATE_TEXT
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, FL_CLIENT, INFERENCE, ClientData, ClientDeclined, ClientEvent
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.examples import MODEL
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import SERVER, ServerData, ServerEvent, StoreProblem
from fedbus.contracts.serving import DataChecked, DataCheckResult, DataCounted

DEV = FederationId("dev")


def test_every_state_of_a_client_has_a_description() -> None:
    for lifecycle in (CLIENT, FL_CLIENT, INFERENCE):
        assert {(lifecycle.kind, str(state)) for state in lifecycle.states} <= STATE_TEXT.keys()


async def test_why_prints_states_data_and_declined_runs(nats: NatsServer, tmp_path: Path) -> None:
    fedbus = FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)
    async with Bus.connect(nats.url, Identity(DEV, "server-manager")) as server:
        await server.create_streams()
    async with (
        Bus.connect(nats.url, Identity(DEV, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus) as lifecycles,
    ):
        client = await lifecycles.load(CLIENT, ClientData(client="c1", task="mnist"))
        await client.create()
        await client.transition(ClientEvent.MODEL_FETCHED, {"model": MODEL})
        await client.transition(ClientEvent.INFER_READY)
        for number, labelled in ((1, 3), (2, 12)):
            await bus.publish(
                ClientDeclined(
                    task="mnist",
                    client="c1",
                    run=f"mnist-{number}",
                    reason=f"labelled is {labelled}, and should be at least 64",
                    rule="labelled >= 64",
                    facts={"labelled": labelled},
                )
            )
        await bus.publish(DataCounted(task="mnist", client="c1", labelled=12, unlabelled=500))
        much = DataCheckResult(
            check="labels", ok=False, value=0.9, limit=0.5, what="9 of 10 rows have no label"
        )
        await bus.publish(
            DataChecked(task="mnist", client="c1", rows=10, findings=(much,), drift_unknown="no SciPy")
        )
    result = await fedbus("why", "c1")
    facts = await fedbus("why", "c1", "--task", "mnist", "--json")
    unknown = await fedbus("why", "c9")
    elsewhere = await fedbus("why", "c1", "--task", "nope")

    lines = result.out.splitlines()
    assert lines[0] == "c1 in task mnist"
    assert lines[1].startswith("  client        serves predictions and can take part in a run, since ")
    assert lines[2].startswith("  data          12 labelled, 500 unlabelled, counted ")
    assert lines[3].startswith(
        "  data checks   labels: 9 of 10 rows have no label; no drift check: no SciPy (10 rows, "
    )
    assert [line.split(",")[0].strip() for line in lines[5:7]] == ["mnist-2", "mnist-1"]
    assert lines[5].endswith("labelled is 12, and should be at least 64")
    assert lines[7] == "  eligibility rule: labelled >= 64   (values: labelled 12)"
    assert facts.facts[0]["declined"][0]["facts"] == {"labelled": 12.0}
    assert (elsewhere.code, elsewhere.err) == (5, "fedbus: client c1 has no task nope. Its tasks: mnist\n")
    assert (unknown.code, unknown.err) == (
        5,
        "fedbus: no client c9 in this federation. See: fedbus clients ls\n",
    )


async def test_why_prints_the_problem_of_the_model_repository(nats: NatsServer, tmp_path: Path) -> None:
    fedbus = FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)
    async with (
        Bus.connect(nats.url, Identity(DEV, "server-manager")) as bus,
        LifecycleStore.open(bus) as lifecycles,
    ):
        await bus.create_streams()
        server = await lifecycles.load(SERVER, ServerData(task="mnist"))
        await server.create()
        await server.transition(
            ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.EMPTY}, reason="it lacks v2"
        )
    async with (
        Bus.connect(nats.url, Identity(DEV, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus) as lifecycles,
    ):
        await (await lifecycles.load(CLIENT, ClientData(client="c1", task="mnist"))).create()

    result = (await fedbus("why", "c1")).out.splitlines()
    assert result[2] == "  server        the model repository is empty, so no run can start: it lacks v2"
    assert (await fedbus("why", "c1", "--json")).facts[0]["trouble"] == {
        "kind": "empty",
        "reason": "it lacks v2",
    }


async def test_why_prints_the_device_without_control_characters(nats: NatsServer, tmp_path: Path) -> None:
    fedbus = FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)
    async with Bus.connect(nats.url, Identity(DEV, "server-manager")) as server:
        await server.create_streams()
    async with (
        Bus.connect(nats.url, Identity(DEV, "device-monitor", "c1")) as bus,
        LifecycleStore.open(bus) as lifecycles,
    ):
        client = await lifecycles.load(CLIENT, ClientData(client="c1", task="mnist"))
        await client.create()
        agents = {"inference": True, "flower-client": False}
        report = DeviceReport(task="mnist", client="c1", cpu=0.5, memory=0.25, disk=0.1, agents=agents)
        await bus.publish(report.model_copy(update={"last_error": "\x1b[2J[bold]no room"}))
        await eventually(lambda: _is_stored(bus))
        result = await fedbus("why", "c1")

    assert result.out.splitlines()[2].startswith(
        "  device        cpu 50%, memory 25%, disk 10%; not running: flower-client; "
        "last error:  [2J[bold]no room, reported "
    )


async def _is_stored(bus: Bus) -> bool:
    return bool(await bus.last_per_device(DeviceReport))
