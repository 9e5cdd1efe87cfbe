"""The lifecycle that the client manager owns, as its decisions see it: state and data, without the bus."""

from datetime import datetime

from fedbus.agents.client_manager.effects import MoveClient
from fedbus.agents.common.machine import LifecycleRecord
from fedbus.contracts.client import CLIENT, ClientChanges, ClientData, ClientEvent, ClientState


class ClientRecord(LifecycleRecord[ClientState, ClientEvent, ClientData]):
    """The client, as its lifecycle has it."""

    def move(
        self,
        event: ClientEvent,
        changes: ClientChanges | None = None,
        *,
        reason: str = "",
        deadline: datetime | None = None,
    ) -> MoveClient:
        """Follow the arrow of *event*; raises IllegalTransition and IllegalChange."""
        changes = changes or {}
        self._advance(CLIENT, event, changes, reason)
        return MoveClient(event, changes, reason, deadline)
