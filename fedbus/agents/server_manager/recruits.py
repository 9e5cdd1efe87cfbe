"""Reads what the clients of a task have published about the run that recruits."""

from fedbus.agents.server_manager.events import RecruitsRead
from fedbus.bus.bus import Bus
from fedbus.contracts.client import CLIENT, ClientData, ClientDeclined, ClientState, FailTrain


async def read_recruits(bus: Bus, task: str, run: str) -> RecruitsRead:
    """Read the clients of *task*, and their last messages about *run*."""
    clients = [
        one.facts
        for one in await bus.current_states(CLIENT.kind, f"*.{task}")
        if isinstance(one.facts, ClientData) and one.target != ClientState.TERMINATED
    ]
    declined = await bus.last_per_sender(ClientDeclined, task=task)
    failed = await bus.last_per_sender(FailTrain, task=task)
    return RecruitsRead(
        declined={
            one.client: one.reason for one in declined if isinstance(one, ClientDeclined) and one.run == run
        },
        load_failures={
            one.client: one.reason
            for one in failed
            if isinstance(one, FailTrain) and one.run == run and one.load_failed
        },
        loading=frozenset(one.client for one in clients if one.run == run),
        known=frozenset(one.client for one in clients),
    )
