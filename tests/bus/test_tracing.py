"""Telemetry of the bus: spans of durable messages, metrics of all, and the event id in log lines."""

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


async def test_publish_and_process_are_one_trace_with_the_event_id(server_bus: Bus, client_bus: Bus) -> None:
    with record_spans() as spans:
        async with server_bus.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox:
            await client_bus.publish(JOINED)
            delivery = await asyncio.wait_for(anext(inbox), 20)
            with delivery.process():
                assert structlog.contextvars.get_contextvars()["event_id"] == delivery.envelope.id
            assert "event_id" not in structlog.contextvars.get_contextvars()
            await delivery.ack()
    publish, process = spans.get_finished_spans()

    assert (publish.name, process.name) == ("publish joined", "process joined")
    assert publish.context
    assert process.parent
    assert process.parent.span_id == publish.context.span_id
    assert delivery.sender_span
    assert delivery.sender_span.span_id == publish.context.span_id
    assert publish.attributes
    assert publish.attributes["messaging.message.id"] == delivery.envelope.id
    assert publish.attributes["messaging.destination.name"] == "fedbus.test.client.c1.mnist.joined"
    assert (
        publish.attributes["messaging.destination.template"]
        == "fedbus.{federation}.client.{client}.{task}.joined"
    )


async def test_a_heartbeat_has_no_span(nats: NatsServer, server_bus: Bus) -> None:
    with record_spans() as spans:
        async with (
            server_bus.subscribe_ephemeral(Heartbeat, task="mnist") as beats,
            Bus.connect(nats.url, Identity(FED, "flower-client", "c1")) as bus,
        ):
            await bus.publish(Heartbeat(task="mnist", client="c1", run="mnist-1"))
            await asyncio.wait_for(anext(beats), 20)

    assert spans.get_finished_spans() == ()


async def test_redeliveries_and_dead_letters_are_counted(server_bus: Bus, client_bus: Bus) -> None:
    enable_metrics()
    async with server_bus.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox:
        headers = make_envelope(JOINED, source=client_bus.source).headers()
        await client_bus.publish_to_stream(subjects.subject_for(FED, JOINED), headers, b"no message at all")
        await client_bus.publish(JOINED)
        first = await asyncio.wait_for(anext(inbox), 20)
        await first._raw.nak()
        again = await asyncio.wait_for(anext(inbox), 20)
        await again.ack()

    assert again.envelope.id == first.envelope.id
    await eventually(
        lambda: {"fedbus.event.redeliveries", "fedbus.event.dead_letters"} <= own_metrics().keys()
    )


async def test_a_message_published_in_a_handler_names_its_cause(server_bus: Bus, client_bus: Bus) -> None:
    async with server_bus.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox:
        await client_bus.publish(JOINED)
        first = await asyncio.wait_for(anext(inbox), 20)
        with first.process():
            later = asyncio.create_task(client_bus.publish(JOINED))
        await later
        second = await asyncio.wait_for(anext(inbox), 20)
        await client_bus.publish(JOINED)
        third = await asyncio.wait_for(anext(inbox), 20)
    assert [one.envelope.cause for one in (first, second, third)] == ["", first.envelope.id, ""]


async def test_a_request_passes_on_its_own_cause(nats: NatsServer, server_bus: Bus) -> None:
    causes: list[str] = []

    async def answer(_: Request[Body]) -> Body:
        causes.append(current_cause())
        return Refused(reason="no")

    handlers = dict.fromkeys(requests_answered_by("registrar"), answer)
    async with (
        Bus.connect(nats.url, Identity(FED, "registrar")) as registrar,
        registrar.serve(handlers, task="mnist", version="1.0.0"),
    ):
        with cause_scope("what-led-to-it"), pytest.raises(RequestRefused):
            await server_bus.request(GetLastTransition(task="mnist", client="c1", kind="client"))
    assert causes == ["what-led-to-it"]
