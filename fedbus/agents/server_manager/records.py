"""The lifecycles that the server manager owns, as its decisions see them: state and data, without the bus.

A record moves when a decision is taken; the agent publishes the same transition when it performs the effect.
"""

from datetime import datetime

from fedbus.agents.common.machine import LifecycleRecord
from fedbus.agents.server_manager.effects import MoveCode, MoveServer
from fedbus.contracts.code import CODE, CodeChanges, CodeData, CodeEvent, CodeState
from fedbus.contracts.server import SERVER, ServerChanges, ServerData, ServerEvent, ServerState
from fedbus.contracts.situations import ServerSituation, server_situation

REASON_CHARS = 1000
"""The longest reason of a transition of the code."""


class ServerRecord(LifecycleRecord[ServerState, ServerEvent, ServerData]):
    """The server of a task."""

    @property
    def situation(self) -> ServerSituation:
        """Return the situation of the current state; raises IncompleteData."""
        return server_situation(self.state, self.data)

    def allows(self, event: ServerEvent) -> bool:
        return SERVER.allows(self.state, event)

    def move(
        self,
        event: ServerEvent,
        changes: ServerChanges | None = None,
        *,
        reason: str = "",
        deadline: datetime | None = None,
    ) -> MoveServer:
        """Follow the arrow of *event*; raises IllegalTransition and IllegalChange."""
        changes = changes or {}
        self._advance(SERVER, event, changes, reason)
        return MoveServer(event, changes, reason, deadline)


class CodeRecord(LifecycleRecord[CodeState, CodeEvent, CodeData]):
    """The code versions of a task."""

    def move(self, event: CodeEvent, changes: CodeChanges | None = None, *, reason: str = "") -> MoveCode:
        """Follow the arrow of *event*; raises IllegalTransition and IllegalChange."""
        changes = changes or {}
        self._advance(CODE, event, changes, reason)
        return MoveCode(event, changes, reason[:REASON_CHARS])
