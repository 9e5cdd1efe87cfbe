"""The bus from both ends, over a real nats-server."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Self

import pytest
from opentelemetry import trace
from structlog.testing import capture_logs
from support import NatsServer, OwnNatsServer, eventually
from support.raw_connection import connect_raw

from fedbus.bus import stream_reader, streams
from fedbus.bus.bus import Bus, Delivery, Identity
from fedbus.bus.errors import BusClosed, BusUnreachable, NoResponse, RequestRefused
from fedbus.bus.nats import connection as nats_connection
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.client import ClientJoined, FinTrain, Heartbeat
from fedbus.contracts.envelope import MAX_EVENT_BYTES, make_envelope, pack
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, Message, Refused, Request
from fedbus.contracts.run import RunStarted, RunStopped, StartRun, StopRun
from fedbus.contracts.server import UpdateReady
from fedbus.contracts.transition import Transition

FED = FederationId("test")
JOINED = ClientJoined(task="mnist", client="c1", run="mnist-1")


async def next_message(inbox: "asyncio.Queue[Message]") -> Message:
    return await asyncio.wait_for(inbox.get(), 10)


class RecordingConsumer:
    """Consumes and acknowledges everything that an agent is sent."""

    def __init__(self, bus: Bus, agent: AgentName) -> None:
        self._bus, self._agent = bus, agent
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.deliveries: list[Delivery] = []
        self._task: asyncio.Task[None] | None = None
        self._is_consuming = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._consume())
        await self._is_consuming.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _consume(self) -> None:
        async with self._bus.consume(self._agent, task="mnist") as inbox:
            self._is_consuming.set()
            async for delivery in inbox:
                await delivery.ack()
                self.deliveries.append(delivery)
                self.messages.put_nowait(delivery.message)


async def test_a_published_message_arrives_unchanged(server_bus: Bus, client_bus: Bus) -> None:
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        await client_bus.publish(JOINED)
        assert await next_message(consumer.messages) == JOINED
    assert consumer.deliveries[0].envelope.source == "fedbus/test/flower-client/c1"


async def test_a_durable_message_waits_for_an_absent_consumer(
    server_bus: Bus, client_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "ACK_WAIT_S", 0.5)  # NATS may deliver it to the consumer that has just ended
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER):
        pass
    await client_bus.publish(JOINED)
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        assert await next_message(consumer.messages) == JOINED


async def test_a_repeat_under_the_same_key_is_dropped(server_bus: Bus, client_bus: Bus) -> None:
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        for _ in range(3):
            await client_bus.publish(JOINED, id="once")
        await client_bus.publish(JOINED.model_copy(update={"run": "mnist-2"}))
        assert await next_message(consumer.messages) == JOINED
        assert await next_message(consumer.messages) != JOINED


async def test_a_heartbeat_reaches_subscribers_and_is_not_stored(
    server_bus: Bus, client_bus: Bus, nats: NatsServer
) -> None:
    beat = Heartbeat(task="mnist", client="c1", run="mnist-1")
    async with server_bus.subscribe_ephemeral(Heartbeat, task="mnist") as beats:
        await client_bus.publish(beat)
        assert await anext(beats) == beat
    connection = await connect_raw(nats.url)
    info = await connection.jetstream().stream_info(streams.events_stream(FED))
    await connection.close()
    assert info.state.messages == 0


async def test_a_full_buffer_drops_heartbeats_and_keeps_durable_messages(
    own_nats: OwnNatsServer, server_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_connection, "PENDING_BYTES", 0)
    async with Bus.connect(own_nats.url, Identity(FED, "flower-client", "c1")) as bus:
        await own_nats.kill()
        await eventually(lambda: not bus.is_connected)
        await bus.publish(Heartbeat(task="mnist", client="c1", run="mnist-1"))
        durable = asyncio.create_task(bus.publish(JOINED))
        await own_nats.start()
        await durable


async def test_a_killed_server_loses_no_durable_message(
    own_nats: OwnNatsServer, server_bus: Bus, client_bus: Bus
) -> None:
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        await client_bus.publish(JOINED)
        await own_nats.kill()
        during = asyncio.create_task(client_bus.publish(JOINED.model_copy(update={"run": "mnist-2"})))
        await own_nats.start()
        await asyncio.wait_for(during, 20)
        runs: set[str] = set()
        while len(runs) < 2:
            message = await asyncio.wait_for(consumer.messages.get(), 20)
            assert isinstance(message, ClientJoined)
            runs.add(message.run)
    assert runs == {"mnist-1", "mnist-2"}


async def test_a_consumer_continues_the_trace_of_the_sender(server_bus: Bus, client_bus: Bus) -> None:
    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        with trace.get_tracer("test").start_as_current_span("a user does something") as root:
            await client_bus.publish(JOINED)
        await next_message(consumer.messages)
        with consumer.deliveries[0].process():
            current = trace.get_current_span().get_span_context()
    assert current.trace_id == root.get_span_context().trace_id


# --- dead letters -----------------------------------------------------------------------


async def dead_letters(nats: NatsServer) -> list[str]:
    connection = await connect_raw(nats.url)
    js = connection.jetstream()
    count = (await js.stream_info(streams.dead_letter_stream(FED))).state.messages
    letters = [await js.get_msg(streams.dead_letter_stream(FED), seq) for seq in range(1, count + 1)]
    await connection.close()
    return [(letter.headers or {})["fedbus-reason"] for letter in letters]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ce-type": "dev.fedbus.joined.v9"}, "does not know the message type 'dev.fedbus.joined.v9'"),
        ({"ce-source": "fedbus/test/flower-client/c2"}, "forged"),
        ({"ce-specversion": "2.0"}, "CloudEvents version 2.0 is not supported"),
        ({"body": b"\xc1 no msgpack"}, "not valid msgpack"),
        (
            {"body": pack(JOINED.model_copy(update={"client": "c2"}))},
            "forged: the subject is of client c1, but the body is of client c2",
        ),
        ({"body": b"x" * (MAX_EVENT_BYTES + 1)}, f"(limit {MAX_EVENT_BYTES})"),
    ],
    ids=["foreign version", "forged source", "foreign spec", "unreadable", "forged identity", "oversized"],
)
async def test_an_undecodable_message_becomes_a_dead_letter(
    server_bus: Bus, client_bus: Bus, nats: NatsServer, change: dict[str, str | bytes], reason: str
) -> None:
    headers = make_envelope(JOINED, source=client_bus.source).headers()
    body = change.get("body", pack(JOINED))
    assert isinstance(body, bytes)
    headers |= {name: str(value) for name, value in change.items() if name != "body"}

    async with RecordingConsumer(server_bus, AgentName.SERVER_MANAGER) as consumer:
        await client_bus.publish_to_stream(subjects.subject_for(FED, JOINED), headers, body)
        await client_bus.publish(JOINED.model_copy(update={"run": "mnist-2"}))
        assert await next_message(consumer.messages) == JOINED.model_copy(update={"run": "mnist-2"})

    assert [letter for letter in await dead_letters(nats) if reason in letter]


async def test_a_message_that_is_too_large_is_not_sent(server_bus: Bus, client_bus: Bus) -> None:
    await server_bus.create_streams()
    big = FinTrain.model_construct(task="mnist", client="c1", run="x" * (MAX_EVENT_BYTES + 1), rounds=0)
    with pytest.raises(ValueError, match="send large content as a blob"):
        await client_bus.publish(big)


# --- requests ---------------------------------------------------------------------------


class FakeScheduler:
    """Answers the requests of a scheduler, and counts the runs."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    async def start(self, request: StartRun) -> Body:
        if request.rounds == 99:
            return Refused(reason="99 rounds are too many")
        if request.rounds == 98:
            raise RuntimeError("a bug")
        return RunStarted(run=f"mnist-{next(self._numbers)}")

    async def stop(self, request: StopRun) -> Body:
        return RunStopped(run=request.run)


async def run_scheduler(nats: NatsServer, ready: "asyncio.Future[None]", done: asyncio.Event) -> None:
    scheduler = FakeScheduler()
    async with (
        Bus.connect(nats.url, Identity(FED, "workflow-scheduler")) as bus,
        bus.serve({StartRun: scheduler.start, StopRun: scheduler.stop}, task="mnist", version="0.1.0"),
    ):
        ready.set_result(None)
        await done.wait()


async def test_a_reply_a_refusal_and_an_internal_error_differ(nats: NatsServer, client_bus: Bus) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(run_scheduler(nats, ready, done))
        await ready
        assert await client_bus.request(StartRun(task="mnist")) == RunStarted(run="mnist-1")
        with pytest.raises(RequestRefused, match="99 rounds are too many"):
            await client_bus.request(StartRun(task="mnist", rounds=99))
        with pytest.raises(RequestRefused, match="internal error in the workflow-scheduler"):
            await client_bus.request(StartRun(task="mnist", rounds=98))
        assert await client_bus.request(StopRun(task="mnist", run="mnist-1")) == RunStopped(run="mnist-1")
        done.set()


async def test_an_unserved_request_names_the_responsible_agent(server_bus: Bus, client_bus: Bus) -> None:
    assert isinstance(server_bus, Bus)
    with pytest.raises(NoResponse, match="Check that the workflow-scheduler is running"):
        await client_bus.request(StartRun(task="mnist"))


async def test_an_undecodable_request_is_refused_with_the_reason(nats: NatsServer) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(run_scheduler(nats, ready, done))
        await ready
        connection = await connect_raw(nats.url)
        reply = await connection.request("fedbus.test.svc.mnist.start_run", b"?", headers={"a": "b"})
        await connection.close()
        done.set()
    assert b"header ce-specversion is missing" in reply.data


def test_every_request_names_its_answer() -> None:
    for kind in MESSAGES:
        assert not issubclass(kind, Request) or issubclass(kind.reply_type, Body)


# --- connection and reads -----------------------------------------------------------------


async def test_a_missing_nats_server_is_reported_with_its_address() -> None:
    with pytest.raises(BusUnreachable, match=r"no nats-server at nats://127\.0\.0\.1:1"):
        async with Bus.connect("nats://127.0.0.1:1", Identity(FED, "server-manager")):
            pass


async def test_the_states_of_a_new_federation_are_empty(server_bus: Bus) -> None:
    assert await server_bus.current_states("run") == []


async def test_a_bus_reconnects_as_often_as_its_server_restarts(
    own_nats: OwnNatsServer, server_bus: Bus
) -> None:
    for _ in range(3):
        await own_nats.kill()
        await own_nats.start()
        await eventually(lambda: publish_update_ready(server_bus))


@pytest.mark.parametrize("start", ["since", "after", "whole", "new"])
async def test_a_reader_continues_after_a_restart_of_the_server(
    own_nats: OwnNatsServer, server_bus: Bus, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(stream_reader, "HEARTBEAT_S", 0.2)
    stream, wanted = streams.events_stream(FED), [subjects.wildcard_for(FED, UpdateReady)]
    for _ in range(2):
        await publish_update_ready(server_bus)
    _, last = await server_bus.sequence_range(stream)
    options: dict[str, dict[str, Any]] = {
        "since": {"since": datetime.now(UTC)},
        "after": {"after": last},
        "whole": {"whole": True},
        "new": {},
    }
    async with server_bus.read_stream(stream, wanted, **options[start]) as messages:
        stored = [(await anext(messages)).sequence for _ in range(last if start == "whole" else 0)]
        await own_nats.kill()
        await own_nats.start()
        await eventually(lambda: publish_update_ready(server_bus))
        async with asyncio.timeout(40):
            assert (await anext(messages)).sequence == last + 1
    assert stored == ([*range(1, last + 1)] if start == "whole" else [])


async def test_a_consumer_raises_when_the_connection_is_closed(server_bus: Bus) -> None:
    async with (
        server_bus.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox,
        server_bus.subscribe_ephemeral(Heartbeat, task="mnist") as heartbeats,
        server_bus.read_stream(
            streams.lifecycle_stream(FED), [subjects.wildcard_for(FED, Transition)]
        ) as moves,
    ):
        consuming = [asyncio.ensure_future(anext(one)) for one in (inbox, heartbeats, moves)]
        await asyncio.sleep(0)
        await server_bus._client.close()
        for one in consuming:
            with pytest.raises(BusClosed, match="is closed"):
                await one


async def test_a_consumer_ends_with_its_own_bus(nats: NatsServer) -> None:
    async with (
        Bus.connect(nats.url, Identity(FED, "test")) as bus,
        bus.subscribe_ephemeral(Heartbeat, task="mnist") as heartbeats,
    ):
        consuming = asyncio.ensure_future(anext(heartbeats, None))
        await asyncio.sleep(0)
    assert await consuming is None


@pytest.fixture
async def impatient(own_nats: OwnNatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bus]:
    """A bus with a short timeout for JetStream."""
    monkeypatch.setattr(stream_reader, "ACK_TIMEOUT_S", 0.1)
    async with Bus.connect(own_nats.url, Identity(FED, "test")) as bus:
        yield bus


READS: dict[str, Callable[[Bus], Awaitable[object]]] = {
    "last of each": lambda bus: bus.current_states("run"),
    "range": lambda bus: bus.sequence_range(streams.lifecycle_stream(FED)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
async def test_a_read_that_jetstream_does_not_answer_is_repeated(
    own_nats: OwnNatsServer,
    server_bus: Bus,
    impatient: Bus,
    read: Callable[[Bus], Awaitable[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with own_nats.freeze(), capture_logs() as logs:
        reading = asyncio.ensure_future(read(impatient))
        await eventually(lambda: any("Stream read failed" in one["event"] for one in logs))
        monkeypatch.setattr(stream_reader, "ACK_TIMEOUT_S", 60.0)
    assert await reading in ([], (0, 0))


async def test_a_read_that_jetstream_never_answers_fails_in_the_end(
    own_nats: OwnNatsServer, server_bus: Bus, impatient: Bus
) -> None:
    with (
        own_nats.freeze(),
        pytest.raises(NoResponse, match="a read of FEDBUS_test_LIFE: no reply in 5 attempts"),
    ):
        await impatient.current_states("run")


async def publish_update_ready(bus: Bus) -> bool:
    await bus.publish(JOINED_BY_SERVER)
    return True


JOINED_BY_SERVER = UpdateReady.model_validate(
    {"task": "mnist", "run": "mnist-1", "plan": {}, "recruit_until": "2026-01-01T00:00:00Z"}
)


async def test_a_follower_of_a_lifecycle_has_one_transition_in_flight(server_bus: Bus) -> None:
    """Otherwise a redelivered transition would arrive after newer ones."""
    async with server_bus.consume(AgentName.WORKFLOW_SCHEDULER, task="mnist"):
        name = streams.consumer_name(server_bus.identity.owner, "mnist", AgentName.WORKFLOW_SCHEDULER)
        found = await server_bus._js.consumer_info(streams.lifecycle_stream(FED), name)

    assert found.config.max_ack_pending == 1
