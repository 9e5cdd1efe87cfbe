"""A task that is asked to end, ends: also when the answer that it waits for comes in that very moment."""

import asyncio

from nats.aio.msg import Msg
from support import NatsServer

from fedbus.bus.bus import Bus, Identity
from fedbus.bus.nats.cancellation import next_message
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")


async def publish_and_continue(bus: Bus, said: ClientJoined) -> None:
    await bus.publish(said)
    await asyncio.Event().wait()


async def test_a_cancellation_that_meets_the_answer_is_not_lost(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "trainer", "c1")) as bus:
        await bus.create_streams()
        async with bus.subscribe_ephemeral(ClientJoined, task="tiny") as heard:
            for number in range(200):
                joined = ClientJoined(task="tiny", client="c1", run=f"tiny-{number}")
                saying = asyncio.create_task(publish_and_continue(bus, joined))
                await anext(heard)  # on the same connection: the acknowledgement comes in the same breath
                saying.cancel()
                ended, _ = await asyncio.wait([saying], timeout=5)
                assert ended, "it was cancelled, and goes on"


async def test_a_cancellation_that_meets_the_next_message_is_not_lost(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "trainer", "c1")) as bus, bus.subscribe("told") as told:

        async def hear_and_go_on() -> None:
            await next_message(told, within_s=10)
            await asyncio.Event().wait()

        for _ in range(50):
            hearing = asyncio.create_task(hear_and_go_on())
            await asyncio.sleep(0)  # it waits
            told._pending_queue.put_nowait(Msg(_client=told._conn, subject="told"))
            await asyncio.sleep(0)  # the message is there, and is handed on in the next turn of the loop
            hearing.cancel()
            ended, _ = await asyncio.wait([hearing], timeout=5)
            assert ended, "it was cancelled, and goes on"
