"""The queue of events that an inference agent publishes."""

import asyncio
from dataclasses import replace

from nats import connect as nats_connect
from support.federation import TASK, FederationHarness
from support.inference_agent import NAME

from fedbus.agents.inference.event_queue import EventQueue
from fedbus.bus.streams import events_stream
from fedbus.contracts.envelope import MAX_EVENT_BYTES
from fedbus.contracts.serving import CapturePaused, CaptureResumed


async def test_an_event_that_nats_rejects_is_dropped(fed: FederationHarness) -> None:
    """One body is too large for all streams, the other for this stream; neither stops the queue."""
    events, stream = EventQueue(), events_stream(fed.config.federation)
    publisher = await fed.connect_as("inference", NAME)
    for reason in ("x" * (MAX_EVENT_BYTES + 1), "y" * 2000):
        events.enqueue(CapturePaused(task=TASK, client=NAME, reason=reason))
    events.enqueue(CaptureResumed(task=TASK, client=NAME))
    client = await nats_connect(fed.config.nats_url, connect_timeout=30)
    try:
        config = (await client.jetstream().stream_info(stream)).config
        await client.jetstream().update_stream(replace(config, max_msg_size=1500))
    finally:
        await client.close()
    publishing = asyncio.create_task(events.drain_to(publisher))
    await fed.wait_for_message(CaptureResumed)
    assert not publishing.done()
    assert not fed.messages_of(CapturePaused)
    publishing.cancel()
