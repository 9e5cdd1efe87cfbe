"""The messenger over a bus in memory, and the limits of the values that one client reports."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flwr.app import MetricRecord, RecordDict
from learning.messenger_suite import LONG_S, PLAN, MessengerSuite, ScriptedSession, request

from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.run import RunPlan
from fedbus.learning.flower.replies import sample_count
from fedbus.learning.library import ClientReply, ErrorCode, MessengerClosed, OutgoingMessage
from fedbus.learning.memory_bus import MemoryBus, MemoryDevice
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.payload import Payload
from fedbus.learning.round_tallies import MAX_FAILURE_CHARS, MAX_SAMPLES


class TestBusMessenger(MessengerSuite):
    @contextmanager
    def open_messenger(self, sessions: dict[str, ScriptedSession]) -> Iterator[BusMessenger]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="event loop")
        thread.start()
        devices: list[MemoryDevice] = []

        async def join() -> BusMessenger:
            bus = MemoryBus()
            messenger = BusMessenger(bus, task="mnist", run="run-1", plan=PLAN)
            for name, session in sessions.items():
                devices.append(MemoryDevice(session, name, bus, messenger.deliver))
                bus.subscribers[name] = devices[-1].receive
                messenger.deliver(ClientJoined(task="mnist", client=name, run="run-1"))
            return messenger

        async def leave() -> None:
            messenger.close("the test is over")
            for device in devices:
                await device.close()

        messenger = asyncio.run_coroutine_threadsafe(join(), loop).result()
        try:
            yield messenger
        finally:
            asyncio.run_coroutine_threadsafe(leave(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def test_take_ends_when_a_client_joins_or_leaves_or_the_run_ends() -> None:
    bus = MemoryBus(subscribers={"c1": lambda _: None})
    messenger = BusMessenger(bus, task="mnist", run="run-1", plan=RunPlan())
    c1, c2 = ({"task": "mnist", "client": client, "run": "run-1"} for client in ("c1", "c2"))
    messenger.deliver(ClientJoined.model_validate(c1))
    await asyncio.to_thread(messenger.post, [request("c1", "echo")])

    waiting = asyncio.create_task(asyncio.to_thread(messenger.take, timeout_s=LONG_S, clients=["c1"]))
    await asyncio.sleep(0.01)
    messenger.deliver(ClientJoined.model_validate(c2))
    assert await waiting is None

    messenger.deliver(FailTrain.model_validate({**c1, "reason": "the battery is low"}))
    lost = await asyncio.to_thread(messenger.take, timeout_s=LONG_S, clients=["c1", "c2"])
    assert lost is not None
    assert lost.error is not None
    assert lost.error.code == ErrorCode.CLIENT_LOST

    waiting = asyncio.create_task(asyncio.to_thread(messenger.take, timeout_s=LONG_S))
    await asyncio.sleep(0.01)
    messenger.close("the run was cancelled")
    with pytest.raises(MessengerClosed, match="the run was cancelled"):
        await waiting


async def test_the_reason_and_samples_of_one_client_are_limited() -> None:
    """Otherwise the result of the round could be too large to be published, and the run would fail."""
    messenger = BusMessenger(MemoryBus(), task="mnist", run="run-1", plan=RunPlan())
    request = OutgoingMessage(client="c1", kind="train", payload=Payload.pack([]))
    reply = ClientReply(request=request, round=1)

    messenger.reject(reply, "c1: " + "x" * 1_000_000)
    assert messenger.tally(1).failures == {"c1": "x" * MAX_FAILURE_CHARS}
    messenger.accept(reply, samples=10**400)
    assert messenger.tally(1).participants == {"c1": MAX_SAMPLES}
    messenger.accept(reply, samples=-1)
    assert messenger.tally(1).participants == {"c1": 0}


@pytest.mark.parametrize("count", [float("inf"), float("-inf"), float("nan")])
def test_a_number_of_examples_that_is_not_finite_counts_as_zero(count: float) -> None:
    assert sample_count(RecordDict({"metrics": MetricRecord({"num-examples": count})})) == 0
