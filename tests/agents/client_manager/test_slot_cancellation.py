"""A cancellation of the client manager while it takes a training slot."""

import asyncio
from pathlib import Path

from support.federation import FED, tiny_task
from support.memory_nats import memory_nats

from fedbus.agents.client_manager.agent import ClientManager
from fedbus.agents.client_manager.effects import TakeSlot
from fedbus.agents.client_manager.training_slots import TrainingSlot, TrainingSlots
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import ClientId
from fedbus.simulation.fleet.outbox import MemoryOutbox


async def test_a_manager_cancelled_while_it_takes_a_slot_leaves_none_locked(tmp_path: Path) -> None:
    loop, client = asyncio.get_running_loop(), ClientId("c1")

    class CancellingSlots(TrainingSlots):
        def acquire(self, run: str) -> TrainingSlot | None:
            slot = super().acquire(run)
            loop.call_soon_threadsafe(taking.cancel)
            return slot

    with memory_nats() as nats:
        async with Bus.connect(nats.url, Identity(FED, "client-manager", client)) as bus:
            manager = ClientManager(
                bus,
                tiny_task(tmp_path),
                client,
                directory=tmp_path,
                outbox=MemoryOutbox(),
                slots=CancellingSlots(tmp_path, 1),
            )
            taking = asyncio.ensure_future(manager._perform(TakeSlot(run="tiny-1")))
            await asyncio.wait([taking])
            await loop.shutdown_default_executor()  # a thread that still takes the slot has ended
            await asyncio.sleep(0)
            manager._release_slot()  # the end of `run`
    assert TrainingSlots(tmp_path, 1).acquire("fashion-1")
