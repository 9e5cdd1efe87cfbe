"""The progress of `fedbus up`: what it waits for until every client serves.

On a terminal it is one line that changes; elsewhere each change is a new line.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Console

from fedbus.app.bus_session import latest_transitions, transition_of
from fedbus.app.terminal.progress_bar import status_line
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientState
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import ServerData, ServerState
from fedbus.contracts.transition import Transition

AGENT: Final = "up"
MAX_NAMES: Final = 3


class StartupProgress:
    """Which servers of *tasks*, and which *clients* in each task, have started."""

    def __init__(self, tasks: Sequence[str], clients: Sequence[str]) -> None:
        self._missing_servers = set(tasks)
        self._missing_clients = {f"{client}.{task}" for client in clients for task in tasks}
        self._client_count = len(self._missing_clients)
        self._has_one_task = len(tasks) == 1
        self._start_errors: dict[str, str] = {}
        self._version: int | None = None

    def apply(self, move: Transition) -> None:
        match move.kind, move.target:
            case "server", state if state != ServerState.MODEL_INIT:
                self._missing_servers.discard(move.task)
                if isinstance(move.facts, ServerData) and move.facts.model:
                    self._version = move.facts.model.version
            case "client", ClientState.SERVING:
                self._missing_clients.discard(move.key)
                self._start_errors.pop(move.key, None)
            case "client", ClientState.TERMINATED:
                self._start_errors[move.key] = move.reason

    @property
    def is_complete(self) -> bool:
        return not self._missing_servers and not self._missing_clients

    def __str__(self) -> str:
        """Describe what is missing, or that nothing is."""
        if self._missing_servers:
            return f"waiting for the first model of {', '.join(sorted(self._missing_servers))}"
        if not self._client_count:
            return "the server has started"
        serve = f"{self._client_count - len(self._missing_clients)} of {self._client_count} clients serve"
        if not self._missing_clients:
            return f"{serve}, model v{self._version}" if self._has_one_task and self._version else serve
        if self._start_errors:
            key, reason = next(iter(sorted(self._start_errors.items())))
            return f"{serve}; {self._name(key)} did not start and is restarted: {reason}"
        missing = [self._name(key) for key in sorted(self._missing_clients)]
        return f"{serve}; waiting for {shorten_names(missing)}"

    def _name(self, key: str) -> str:
        client, _, task = key.partition(".")
        return client if self._has_one_task else f"{client} in {task}"


def shorten_names(names: Sequence[str]) -> str:
    """Join the first *names* and count the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{', '.join(names[:MAX_NAMES])}{more}"


async def wait_until_serving(
    url: str, fed: FederationId, progress: StartupProgress, console: Console, *, started_at: datetime
) -> None:
    """Show *progress* until it is complete. Transitions of clients before *started_at* do not count."""
    async with Bus.connect(url, Identity(fed, AGENT)) as bus:
        await bus.create_streams()
        # a restarted server publishes no transition, a restarted client always does
        wanted = [subjects.lifecycle(fed, kind, ">") for kind in ("server", "client")]
        async with bus.read_stream(lifecycle_stream(fed), wanted, since=started_at) as stream:
            for stored in await latest_transitions(bus, "server"):
                progress.apply(transition_of(stored))
            with status_line(console) as show_status:
                while not progress.is_complete:
                    show_status(str(progress))
                    progress.apply(transition_of(await anext(stream)))
    took_s = (datetime.now(UTC) - started_at).total_seconds()
    console.print(f"{progress}, after {took_s:.1f} s", soft_wrap=True, highlight=False)
