"""The progress of `fedbus up`: what it waits for until every client has the first model.

On a terminal it is one line that changes; elsewhere each change is a new line.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Console

from fedbus.app.bus_session import latest_transitions
from fedbus.app.failures import CliError
from fedbus.app.terminal.progress_bar import status_line
from fedbus.app.views.federation_status import apply_stored
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientState
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import SERVER, ServerState
from fedbus.domain.federation_view import ClientKey, FederationView

AGENT: Final = "up"
MAX_NAMES: Final = 3
NO_MODEL: Final = ServerState.MODEL_INIT
STARTED: Final = frozenset({ClientState.SERVING, ClientState.SYNCING, ClientState.LEARNING})
"""The states of a client that has started and has taken the model of the federation."""


class FirstModelNotBuilt(CliError):
    """The code of a task does not make a first model, so that no client and no run can start."""

    def __init__(self, task: str, reason: str) -> None:
        super().__init__(f"task {task} has no first model: {reason}")


class StartupProgress:
    """Which servers of *tasks*, and which *clients* in each task, have started."""

    def __init__(
        self, tasks: Sequence[str], clients: Sequence[str], view: FederationView | None = None
    ) -> None:
        self._tasks = sorted(tasks)
        self._clients = [(client, task) for client in sorted(clients) for task in self._tasks]
        self._view = view or FederationView()

    def apply(self, stored: StoredMessage) -> None:
        apply_stored(self._view, stored)

    @property
    def is_complete(self) -> bool:
        return not self._missing_servers and not self._missing_clients

    @property
    def _missing_servers(self) -> list[str]:
        states = {task: server.state for task, server in self._view.servers.items()}
        return [task for task in self._tasks if states.get(task, NO_MODEL) == NO_MODEL]

    @property
    def _missing_clients(self) -> list[ClientKey]:
        return [key for key in self._clients if self._client_state(key) not in STARTED]

    def _client_state(self, key: ClientKey) -> str:
        return self._view.clients[key].state if key in self._view.clients else ""

    def __str__(self) -> str:
        """Describe what is missing, or that nothing is."""
        if missing_servers := self._missing_servers:
            reasons = [server.reason for task in missing_servers if (server := self._view.servers.get(task))]
            reason = next(filter(None, reasons), "")
            return f"waiting for the first model of {', '.join(missing_servers)}{f': {reason}' if reason else ''}"
        if not self._clients:
            return "the server has started"
        missing = self._missing_clients
        ready = len(self._clients) - len(missing)
        verb = "are ready" if self._not_served and not missing else "serve"
        serve = f"{ready} of {len(self._clients)} clients {verb}"
        if not missing:
            champion = self._view.champion(self._tasks[0]) if len(self._tasks) == 1 else None
            served = f"{serve}, model v{champion.version}" if champion else serve
            return "; ".join(filter(None, (served, self._not_served)))
        for key in missing:
            manager = self._view.clients[key].manager if key in self._view.clients else None
            if manager and manager.state == ClientState.TERMINATED:
                return f"{serve}; {self._name(key)} did not start and is restarted: {manager.reason}"
        return f"{serve}; waiting for {shorten_names([self._name(key) for key in missing])}"

    def check(self, started_at: datetime) -> None:
        """Raise FirstModelNotBuilt if the server of a task could not build its first model since *started_at*."""
        for task in self._tasks:
            if reason := self._view.first_model_failure(task, started_at):
                raise FirstModelNotBuilt(task, reason)

    @property
    def _not_served(self) -> str:
        """Why a client does not serve its model; empty if all do."""
        for key in self._clients:
            if key in self._view.clients and (reason := self._view.clients[key].not_served):
                return reason if len(self._tasks) == 1 else f"{self._name(key)}: {reason}"
        return ""

    def _name(self, key: ClientKey) -> str:
        client, task = key
        return client if len(self._tasks) == 1 else f"{client} in {task}"


def shorten_names(names: Sequence[str]) -> str:
    """Join the first *names* and count the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{', '.join(names[:MAX_NAMES])}{more}"


async def wait_until_serving(
    url: str, fed: FederationId, progress: StartupProgress, console: Console, *, started_at: datetime
) -> None:
    """Show *progress* until it is complete. Transitions of clients before *started_at* do not count.

    Raises:
        FirstModelNotBuilt: The code of a task does not make a first model.

    """
    async with Bus.connect(url, Identity(fed, AGENT)) as bus:
        await bus.create_streams()
        # a restarted server publishes no transition, a restarted client always does
        wanted = [subjects.lifecycle(fed, kind, ">") for kind in ("server", "client")]
        async with bus.read_stream(lifecycle_stream(fed), wanted, since=started_at) as stream:
            for stored in await latest_transitions(bus, SERVER.kind):
                progress.apply(stored)
            with status_line(console) as show_status:
                while not progress.is_complete:
                    progress.check(started_at)
                    show_status(str(progress))
                    progress.apply(await anext(stream))
    took_s = (datetime.now(UTC) - started_at).total_seconds()
    console.print(f"{progress}, after {took_s:.1f} s", soft_wrap=True, highlight=False, markup=False)
