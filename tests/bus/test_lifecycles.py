"""The log is the state: lifecycles moved over a real nats-server."""

import asyncio
from pathlib import Path

import pytest
from opentelemetry.trace import StatusCode
from support import NatsServer, OwnNatsServer, eventually
from support.recorded_telemetry import record_spans

from fedbus.bus.bus import ACK_TIMEOUT_S, Bus, Identity
from fedbus.bus.errors import StaleOwner
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, ClientData, ClientEvent, ClientState
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.lifecycle import IllegalChange, IllegalTransition
from fedbus.contracts.run import RunEvent
from fedbus.contracts.server import SERVER, ServerChanges, ServerData, ServerEvent, ServerState, StoreProblem
from fedbus.contracts.transition import Transition
from fedbus.stores.outbox import SqliteOutbox

FED = FederationId("test")
MNIST = ServerData(task="mnist")
C1 = ClientData(task="mnist", client="c1")


async def current_transitions(bus: Bus, kind: str) -> list[Transition]:
    return await bus.states(kind)


async def test_a_thing_that_was_never_told_of_stands_in_its_first_state(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
    assert life.state is ServerState.MODEL_INIT
    assert not life.born


async def test_a_restarted_owner_goes_on_from_the_last_transition(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
        await life.create()
        await life.transition(ServerEvent.MODEL_READY, {"code_version": "abc"})

    async with LifecycleStore.open(server_bus) as lives:
        again = await lives.of(SERVER, MNIST)
    assert again.state is ServerState.WAITING
    assert again.facts.code_version == "abc"


async def test_an_arrow_that_the_table_has_not_is_refused_and_nothing_is_told(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
        with pytest.raises(IllegalTransition, match="run_finished is not possible in state model_init"):
            await life.transition(ServerEvent.RUN_FINISHED)
    assert await current_transitions(server_bus, "server") == []


@pytest.mark.parametrize(
    ("event", "facts", "kind"),
    [
        (ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.DAMAGED}, "damaged"),
        (ServerEvent.MODEL_NOT_BUILT, {}, "model_not_built"),
        (ServerEvent.MODEL_READY, {}, ""),
    ],
)
async def test_the_span_of_a_failure_says_of_what_kind_it_is(
    server_bus: Bus, event: ServerEvent, facts: ServerChanges, kind: str
) -> None:
    with record_spans() as spans:
        async with LifecycleStore.open(server_bus) as lives:
            life = await lives.of(SERVER, MNIST)
            await life.create()
            await life.transition(event, facts, reason="as it is")
    moved = spans.get_finished_spans()[-1]
    assert moved.attributes
    assert moved.attributes.get("error.type", "") == kind
    assert (moved.status.status_code, moved.status.description) == (
        (StatusCode.ERROR, "as it is") if kind else (StatusCode.UNSET, None)
    )


async def test_what_happens_between_two_runs_does_not_name_the_one_before(server_bus: Bus) -> None:
    with record_spans() as spans:
        async with LifecycleStore.open(server_bus) as lives:
            life = await lives.of(SERVER, MNIST)
            await life.create()
            await life.transition(ServerEvent.MODEL_READY)
            await life.transition(ServerEvent.RUN_REQUESTED, {"run": "mnist-1"})
            await life.transition(ServerEvent.RUN_CANCELLED)
            await life.transition(ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.EMPTY})
            await life.transition(ServerEvent.RUN_REQUESTED, {"run": "mnist-2"})
    moves = {
        one.attributes["fedbus.event"]: one.attributes for one in spans.get_finished_spans() if one.attributes
    }
    assert moves["run_cancelled"]["fedbus.run"] == "mnist-1"
    assert moves["run_requested"]["fedbus.run"] == "mnist-2"
    assert "fedbus.run" not in moves["store_unavailable"]


async def test_a_change_that_the_table_has_not_publishes_nothing(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
        await life.create()
        with pytest.raises(IllegalChange, match="changes code_versoin, which is no field"):
            await life.transition(ServerEvent.MODEL_READY, {"code_versoin": "x"})  # type: ignore[typeddict-unknown-key]
        with pytest.raises(IllegalChange, match="sets term to a wrong value"):
            await life.transition(ServerEvent.MODEL_READY, {"term": "first"})  # type: ignore[typeddict-item]
        with pytest.raises(IllegalChange, match="model_ready may not change round"):
            await life.transition(ServerEvent.MODEL_READY, {"round": 1})
        with pytest.raises(IllegalTransition):
            await life.transition(RunEvent.CANCELLED)  # type: ignore[arg-type]
    assert [one.event for one in await current_transitions(server_bus, "server")] == [ServerEvent.STARTED]
    assert (life.state, life.facts) == (ServerState.MODEL_INIT, MNIST)


async def test_a_transition_that_is_not_taken_changes_neither_state_nor_data(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as ours, LifecycleStore.open(server_bus) as theirs:
        mine = await ours.of(SERVER, MNIST)
        await mine.create()
        other = await theirs.of(SERVER, MNIST)
        await mine.transition(ServerEvent.MODEL_READY)
        with pytest.raises(StaleOwner):
            await other.transition(ServerEvent.MODEL_READY, {"code_version": "abc"})
    assert (other.state, other.facts, other.event) == (ServerState.MODEL_INIT, MNIST, ServerEvent.STARTED)


async def test_data_are_changed_by_a_transition_and_by_nothing_else(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
        with pytest.raises(AttributeError):
            life.facts = MNIST  # type: ignore[misc]


async def test_a_second_owner_is_refused(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as ours, LifecycleStore.open(server_bus) as theirs:
        mine, other = await ours.of(SERVER, MNIST), await theirs.of(SERVER, MNIST)
        await mine.create()
        with pytest.raises(StaleOwner, match="two agents with the same identity"):
            await other.create()


async def test_a_transition_says_what_the_new_state_waits_for(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        life = await lives.of(SERVER, MNIST)
        await life.create()
    (transition,) = await current_transitions(server_bus, "server")
    assert transition.waits_for == "the model repository"


async def test_a_client_that_is_cut_off_moves_on_and_the_bus_hears_of_it_in_order(
    own_nats: OwnNatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    async with (
        Bus.connect(own_nats.url, Identity(FED, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus, SqliteOutbox(tmp_path / "outbox.db")) as lives,
    ):
        life = await lives.of(CLIENT, C1)
        await life.create()
        await own_nats.kill()
        await life.transition(ClientEvent.MODEL_FETCHED)
        await life.transition(ClientEvent.INFER_READY)
        assert life.state is ClientState.SERVING
        await own_nats.start()

        async def all_told() -> bool:
            return [one.target for one in await current_transitions(server_bus, "client")] == ["serving"]

        await eventually(all_told)


async def test_what_waited_in_the_outbox_is_told_after_a_restart(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    outbox = SqliteOutbox(tmp_path / "outbox.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:
        cut_off = LifecycleStore(bus, outbox)  # never empties its outbox: killed before it could
        life = await cut_off.of(CLIENT, C1)
        await life.create()
        await life.transition(ClientEvent.MODEL_FETCHED)
    assert await current_transitions(server_bus, "client") == []

    async with (
        Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus, outbox) as lives,
    ):
        again = await lives.of(CLIENT, C1)
        assert again.state is ClientState.PENDING_APPLICATION
        await again.transition(ClientEvent.INFER_READY)

    (transition,) = await current_transitions(server_bus, "client")
    assert transition.target == "serving"


async def test_what_another_owner_has_overtaken_is_not_said_after_a_restart(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    outbox = SqliteOutbox(tmp_path / "outbox.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:
        async with LifecycleStore.open(bus, outbox) as lives:
            life = await lives.of(CLIENT, C1)
            await life.create()
        cut_off = LifecycleStore(bus, outbox)  # never empties its outbox: killed before it could
        await (await cut_off.of(CLIENT, C1)).transition(ClientEvent.MODEL_FETCHED)

        async with LifecycleStore.open(bus, SqliteOutbox(tmp_path / "other.db")) as lives:
            other = await lives.of(CLIENT, C1)
            await other.transition(ClientEvent.BOOTSTRAP_FAILED)

        async with LifecycleStore.open(bus, outbox) as lives:
            again = await lives.of(CLIENT, C1)
            assert again.state is ClientState.TERMINATED
            await again.transition(ClientEvent.RESTARTED)

    (transition,) = await current_transitions(server_bus, "client")
    assert (transition.source, transition.target) == ("terminated", "s0")


async def test_a_refused_owner_forgets_what_it_still_wanted_to_say(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    outbox, other = SqliteOutbox(tmp_path / "outbox.db"), SqliteOutbox(tmp_path / "other.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:

        async def move_what_another_has_moved() -> None:
            async with LifecycleStore.open(bus, outbox) as ours:
                life = await ours.of(CLIENT, C1)
                async with LifecycleStore.open(bus, other) as theirs:
                    await (await theirs.of(CLIENT, C1)).create()
                await life.create()
                await life.transition(ClientEvent.MODEL_FETCHED)
                await asyncio.Event().wait()

        with pytest.raises(StaleOwner):
            await move_what_another_has_moved()
    assert outbox.first() is None


async def test_an_owner_that_comes_while_the_bus_is_away_waits_for_it(
    own_nats: OwnNatsServer, server_bus: Bus
) -> None:
    async with LifecycleStore.open(server_bus) as lives:
        await (await lives.of(SERVER, MNIST)).create()
        await own_nats.kill()
        finding = asyncio.ensure_future(lives.of(SERVER, MNIST))
        given_up, _ = await asyncio.wait({finding}, timeout=ACK_TIMEOUT_S + 0.5)
        assert not given_up
        await own_nats.start()
        async with asyncio.timeout(20):
            assert (await finding).born
