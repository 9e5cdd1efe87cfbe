"""A cancelled task ends, even if the reply that it waits for arrives at the same moment."""

import asyncio

from nats.aio.msg import Msg
from support import NatsServer, eventually

from fedbus.bus.bus import Bus, Identity
from fedbus.bus.nats.cancellation import next_message
from fedbus.bus.nats.connection import open_connection
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")


async def publish_and_continue(bus: Bus, message: ClientJoined) -> None:
    await bus.publish(message)
    await asyncio.Event().wait()


async def test_a_cancellation_during_an_acknowledgement_is_not_lost(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "trainer", "c1")) as bus:
        await bus.create_streams()
        async with bus.subscribe_ephemeral(ClientJoined, task="tiny") as received:
            for number in range(200):
                joined = ClientJoined(task="tiny", client="c1", run=f"tiny-{number}")
                publishing = asyncio.create_task(publish_and_continue(bus, joined))
                await anext(
                    received
                )  # the acknowledgement arrives on the same connection, at the same moment
                publishing.cancel()
                ended, _ = await asyncio.wait([publishing], timeout=5)
                assert ended, "the task continues after its cancellation"


async def test_a_cancellation_during_a_refusal_is_not_lost(nats: NatsServer) -> None:
    """Otherwise a loop that repeats a request which no agent serves would go on after its cancellation."""
    async with open_connection(nats.url, name="test", inbox="_INBOX") as connection:
        client = connection.client
        await client.subscribe("silent")
        requesting = asyncio.create_task(client.request("silent", timeout=3600))
        await eventually(lambda: bool(client._resp_map))
        (future,) = client._resp_map.values()
        future.set_result(Msg(_client=client, headers={"Status": "503"}))
        requesting.cancel()
        await asyncio.wait([requesting])
        assert requesting.cancelled()


async def test_a_cancellation_during_a_delivery_is_not_lost(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "trainer", "c1")) as bus, bus.subscribe("test") as inbox:

        async def receive_and_continue() -> None:
            await next_message(inbox, within_s=10)
            await asyncio.Event().wait()

        for _ in range(50):
            receiving = asyncio.create_task(receive_and_continue())
            await asyncio.sleep(0)  # it waits
            inbox._pending_queue.put_nowait(Msg(_client=inbox._conn, subject="test"))
            await asyncio.sleep(
                0
            )  # the message is queued, and delivered in the next iteration of the event loop
            receiving.cancel()
            ended, _ = await asyncio.wait([receiving], timeout=5)
            assert ended, "the task continues after its cancellation"
