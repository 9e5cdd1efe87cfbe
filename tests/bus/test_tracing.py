"""What the bus tells of itself: spans of what is kept, figures of all, and events named in log lines."""

import asyncio

import pytest
import structlog
from support import NatsServer, eventually
from support.recorded_telemetry import enable_metrics, own_metrics, record_spans

from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import RequestRefused
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import requests_answered_by
from fedbus.contracts.causation import cause_scope, current_cause
from fedbus.contracts.client import ClientJoined, Heartbeat
from fedbus.contracts.envelope import make_envelope
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, Refused, Request
from fedbus.contracts.state_recall import GetLastTransition

FED = FederationId("test")
JOINED = ClientJoined(task="mnist", client="c1", run="mnist-1", code_version="0" * 40)


async def test_what_is_said_and_heard_is_one_trace_and_lines_in_it_name_the_event(
    server_bus: Bus, client_bus: Bus
) -> None:
    with record_spans() as spans:
        async with server_bus.listen(AgentName.SERVER_MANAGER, task="mnist") as inbox:
            await client_bus.publish(JOINED)
            delivery = await asyncio.wait_for(anext(inbox), 20)
            with delivery.process():
                assert structlog.contextvars.get_contextvars()["event_id"] == delivery.envelope.id
            assert "event_id" not in structlog.contextvars.get_contextvars()
            await delivery.ack()
    said, heard = spans.get_finished_spans()

    assert (said.name, heard.name) == ("publish joined", "process joined")
    assert said.context
    assert heard.parent
    assert heard.parent.span_id == said.context.span_id
    assert delivery.sender_span
    assert delivery.sender_span.span_id == said.context.span_id
    assert said.attributes
    assert said.attributes["messaging.message.id"] == delivery.envelope.id
    assert said.attributes["messaging.destination.name"] == "fedbus.test.client.c1.mnist.joined"
    assert (
        said.attributes["messaging.destination.template"]
        == "fedbus.{federation}.client.{client}.{task}.joined"
    )


async def test_a_heartbeat_is_no_span_and_carries_the_trace(nats: NatsServer, server_bus: Bus) -> None:
    with record_spans() as spans:
        async with (
            server_bus.subscribe_ephemeral(Heartbeat, task="mnist") as beats,
            Bus.connect(nats.url, Identity(FED, "flower-client", "c1")) as bus,
        ):
            await bus.publish(Heartbeat(task="mnist", client="c1", run="mnist-1"))
            await asyncio.wait_for(anext(beats), 20)

    assert spans.get_finished_spans() == ()


async def test_what_comes_again_and_what_nobody_can_read_is_counted(server_bus: Bus, client_bus: Bus) -> None:
    enable_metrics()
    async with server_bus.listen(AgentName.SERVER_MANAGER, task="mnist") as inbox:
        headers = make_envelope(JOINED, source=client_bus.source).headers()
        await client_bus.store(subjects.subject_for(FED, JOINED), headers, b"no message at all")
        await client_bus.publish(JOINED)
        first = await asyncio.wait_for(anext(inbox), 20)
        await first._raw.nak()
        again = await asyncio.wait_for(anext(inbox), 20)
        await again.ack()

    assert again.envelope.id == first.envelope.id
    await eventually(
        lambda: {"fedbus.event.redeliveries", "fedbus.event.dead_letters"} <= own_metrics().keys()
    )


async def test_what_is_said_while_a_message_is_handled_names_it_and_what_is_begun_meanwhile_too(
    server_bus: Bus, client_bus: Bus
) -> None:
    async with server_bus.listen(AgentName.SERVER_MANAGER, task="mnist") as inbox:
        await client_bus.publish(JOINED)
        first = await asyncio.wait_for(anext(inbox), 20)
        with first.process():
            later = asyncio.create_task(client_bus.publish(JOINED))
        await later
        second = await asyncio.wait_for(anext(inbox), 20)
        await client_bus.publish(JOINED)
        third = await asyncio.wait_for(anext(inbox), 20)
    assert [one.envelope.cause for one in (first, second, third)] == ["", first.envelope.id, ""]


async def test_a_request_which_nobody_keeps_hands_on_what_led_to_it(
    nats: NatsServer, server_bus: Bus
) -> None:
    heard: list[str] = []

    async def answer(_: Request) -> Body:
        heard.append(current_cause())
        return Refused(reason="no")

    handlers = dict.fromkeys(requests_answered_by("registrar"), answer)
    async with (
        Bus.connect(nats.url, Identity(FED, "registrar")) as registrar,
        registrar.serve(handlers, task="mnist", version="1.0.0"),
    ):
        with cause_scope("what-led-to-it"), pytest.raises(RequestRefused):
            await server_bus.request(GetLastTransition(task="mnist", client="c1", kind="client"))
    assert heard == ["what-led-to-it"]
