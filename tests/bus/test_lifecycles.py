"""The log is the state: lifecycles over a real nats-server."""

import asyncio
from pathlib import Path

import pytest
from opentelemetry.trace import StatusCode
from support import NatsServer, OwnNatsServer, eventually
from support.recorded_telemetry import record_spans

from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import StaleOwner
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.bus.stream_reader import ACK_TIMEOUT_S
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
    return await bus.current_states(kind)


async def test_an_entity_without_transitions_is_in_its_initial_state(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
    assert life.state is ServerState.MODEL_INIT
    assert not life.exists


async def test_a_restarted_owner_continues_from_the_last_transition(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
        await life.create()
        await life.transition(ServerEvent.MODEL_READY, {"code_version": "abc"})

    async with LifecycleStore.open(server_bus) as lifecycles:
        again = await lifecycles.load(SERVER, MNIST)
    assert again.state is ServerState.WAITING
    assert again.data.code_version == "abc"


async def test_an_illegal_transition_is_rejected_and_not_published(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
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
async def test_the_span_of_a_failure_has_its_kind(
    server_bus: Bus, event: ServerEvent, facts: ServerChanges, kind: str
) -> None:
    with record_spans() as spans:
        async with LifecycleStore.open(server_bus) as lifecycles:
            life = await lifecycles.load(SERVER, MNIST)
            await life.create()
            await life.transition(event, facts, reason="as it is")
    moved = spans.get_finished_spans()[-1]
    assert moved.attributes
    assert moved.attributes.get("error.type", "") == kind
    assert (moved.status.status_code, moved.status.description) == (
        (StatusCode.ERROR, "as it is") if kind else (StatusCode.UNSET, None)
    )


async def test_a_span_between_two_runs_does_not_name_the_last_run(server_bus: Bus) -> None:
    with record_spans() as spans:
        async with LifecycleStore.open(server_bus) as lifecycles:
            life = await lifecycles.load(SERVER, MNIST)
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


async def test_an_illegal_change_publishes_nothing(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
        await life.create()
        with pytest.raises(IllegalChange, match="changes code_versoin, which is not a field"):
            await life.transition(ServerEvent.MODEL_READY, {"code_versoin": "x"})  # type: ignore[typeddict-unknown-key]
        with pytest.raises(IllegalChange, match="sets term to a wrong value"):
            await life.transition(ServerEvent.MODEL_READY, {"term": "first"})  # type: ignore[typeddict-item]
        with pytest.raises(IllegalChange, match="model_ready may not change round"):
            await life.transition(ServerEvent.MODEL_READY, {"round": 1})
        with pytest.raises(IllegalTransition):
            await life.transition(RunEvent.CANCELLED)  # type: ignore[arg-type]
    assert [one.event for one in await current_transitions(server_bus, "server")] == [ServerEvent.STARTED]
    assert (life.state, life.data) == (ServerState.MODEL_INIT, MNIST)


async def test_a_rejected_transition_changes_neither_state_nor_data(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as ours, LifecycleStore.open(server_bus) as theirs:
        mine = await ours.load(SERVER, MNIST)
        await mine.create()
        other = await theirs.load(SERVER, MNIST)
        await mine.transition(ServerEvent.MODEL_READY)
        with pytest.raises(StaleOwner):
            await other.transition(ServerEvent.MODEL_READY, {"code_version": "abc"})
    assert (other.state, other.data, other.event) == (ServerState.MODEL_INIT, MNIST, ServerEvent.STARTED)


async def test_only_a_transition_changes_the_data(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
        with pytest.raises(AttributeError):
            life.data = MNIST  # type: ignore[misc]


async def test_a_second_owner_is_refused(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as ours, LifecycleStore.open(server_bus) as theirs:
        mine, other = await ours.load(SERVER, MNIST), await theirs.load(SERVER, MNIST)
        await mine.create()
        with pytest.raises(StaleOwner, match="two agents with the same identity"):
            await other.create()


async def test_a_transition_names_what_the_new_state_waits_for(server_bus: Bus) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        life = await lifecycles.load(SERVER, MNIST)
        await life.create()
    (transition,) = await current_transitions(server_bus, "server")
    assert transition.waits_for == "the model repository"


async def test_a_disconnected_client_publishes_its_transitions_later(
    own_nats: OwnNatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    async with (
        Bus.connect(own_nats.url, Identity(FED, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus, SqliteOutbox(tmp_path / "outbox.db")) as lifecycles,
    ):
        life = await lifecycles.load(CLIENT, C1)
        await life.create()
        await own_nats.kill()
        await life.transition(ClientEvent.MODEL_FETCHED)
        await life.transition(ClientEvent.INFER_READY)
        assert life.state is ClientState.SERVING
        await own_nats.start()

        async def all_published() -> bool:
            return [one.target for one in await current_transitions(server_bus, "client")] == ["serving"]

        await eventually(all_published)


async def test_the_outbox_is_published_after_a_restart(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    outbox = SqliteOutbox(tmp_path / "outbox.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:
        cut_off = LifecycleStore(bus, outbox)  # never flushes its outbox: killed before it could
        life = await cut_off.load(CLIENT, C1)
        await life.create()
        await life.transition(ClientEvent.MODEL_FETCHED)
    assert await current_transitions(server_bus, "client") == []

    async with (
        Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus,
        LifecycleStore.open(bus, outbox) as lifecycles,
    ):
        again = await lifecycles.load(CLIENT, C1)
        assert again.state is ClientState.PENDING_APPLICATION
        await again.transition(ClientEvent.INFER_READY)

    (transition,) = await current_transitions(server_bus, "client")
    assert transition.target == "serving"


async def test_a_transition_stored_before_a_restart_is_not_repeated(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    """The process was killed before it received the acknowledgement, and restarts after the duplicate window."""
    outbox = SqliteOutbox(tmp_path / "outbox.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:
        life = await LifecycleStore(bus, outbox).load(CLIENT, C1)
        await life.create()
        entry = outbox.first()
        assert entry
        forgotten = {name: value for name, value in entry.headers.items() if name != "Nats-Msg-Id"}
        stored = await bus.publish_to_stream(entry.subject, forgotten, entry.body)

        async with LifecycleStore.open(bus, outbox) as lifecycles:
            again = await lifecycles.load(CLIENT, C1)
            assert again.exists
            await again.transition(ClientEvent.MODEL_FETCHED)

    (last,) = await server_bus.last_transitions("client")
    assert last.sequence == stored + 1


async def test_superseded_outbox_entries_are_discarded_after_a_restart(
    nats: NatsServer, server_bus: Bus, tmp_path: Path
) -> None:
    outbox = SqliteOutbox(tmp_path / "outbox.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:
        async with LifecycleStore.open(bus, outbox) as lifecycles:
            life = await lifecycles.load(CLIENT, C1)
            await life.create()
        cut_off = LifecycleStore(bus, outbox)  # never flushes its outbox: killed before it could
        await (await cut_off.load(CLIENT, C1)).transition(ClientEvent.MODEL_FETCHED)

        async with LifecycleStore.open(bus, SqliteOutbox(tmp_path / "other.db")) as lifecycles:
            other = await lifecycles.load(CLIENT, C1)
            await other.transition(ClientEvent.BOOTSTRAP_FAILED)

        async with LifecycleStore.open(bus, outbox) as lifecycles:
            again = await lifecycles.load(CLIENT, C1)
            assert again.state is ClientState.TERMINATED
            await again.transition(ClientEvent.RESTARTED)

    (transition,) = await current_transitions(server_bus, "client")
    assert (transition.source, transition.target) == ("terminated", "s0")


async def test_a_stale_owner_discards_its_outbox(nats: NatsServer, server_bus: Bus, tmp_path: Path) -> None:
    outbox, other = SqliteOutbox(tmp_path / "outbox.db"), SqliteOutbox(tmp_path / "other.db")
    async with Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as bus:

        async def move_what_another_has_moved() -> None:
            async with LifecycleStore.open(bus, outbox) as ours:
                life = await ours.load(CLIENT, C1)
                async with LifecycleStore.open(bus, other) as theirs:
                    await (await theirs.load(CLIENT, C1)).create()
                await life.create()
                await life.transition(ClientEvent.MODEL_FETCHED)
                await asyncio.Event().wait()

        with pytest.raises(StaleOwner):
            await move_what_another_has_moved()
    assert outbox.first() is None


async def test_an_owner_that_starts_while_nats_is_down_waits_for_it(
    own_nats: OwnNatsServer, server_bus: Bus
) -> None:
    async with LifecycleStore.open(server_bus) as lifecycles:
        await (await lifecycles.load(SERVER, MNIST)).create()
        await own_nats.kill()
        loading = asyncio.ensure_future(lifecycles.load(SERVER, MNIST))
        done, _ = await asyncio.wait({loading}, timeout=ACK_TIMEOUT_S + 0.5)
        assert not done
        await own_nats.start()
        async with asyncio.timeout(20):
            assert (await loading).exists
