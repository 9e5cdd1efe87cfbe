"""The first start of everything on one machine: what is still awaited, until every client serves.

On a terminal it is one line that changes; elsewhere a line is told when there is something new to tell.
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
    """Who is there, of the servers of *tasks* and of *clients* in each of them."""

    def __init__(self, tasks: Sequence[str], clients: Sequence[str]) -> None:
        self._servers = set(tasks)
        self._clients = {f"{client}.{task}" for client in clients for task in tasks}
        self._expected = len(self._clients)
        self._one_task = len(tasks) == 1
        self._gave_up: dict[str, str] = {}
        self._version: int | None = None

    def see(self, move: Transition) -> None:
        match move.kind, move.target:
            case "server", state if state != ServerState.MODEL_INIT:
                self._servers.discard(move.task)
                if isinstance(move.facts, ServerData) and move.facts.model:
                    self._version = move.facts.model.version
            case "client", ClientState.SERVING:
                self._clients.discard(move.thing)
                self._gave_up.pop(move.thing, None)
            case "client", ClientState.TERMINATED:
                self._gave_up[move.thing] = move.reason

    @property
    def all_there(self) -> bool:
        return not self._servers and not self._clients

    def __str__(self) -> str:
        """What is awaited, or that all are there."""
        if self._servers:
            return f"waiting for the server of {', '.join(sorted(self._servers))} to have a first model"
        if not self._expected:
            return "the server is there"
        serve = f"{self._expected - len(self._clients)} of {self._expected} clients serve"
        if not self._clients:
            return f"{serve}, model v{self._version}" if self._one_task and self._version else serve
        if self._gave_up:
            thing, reason = next(iter(sorted(self._gave_up.items())))
            return f"{serve}; {self._name(thing)} could not begin, and is started again: {reason}"
        missing = [self._name(thing) for thing in sorted(self._clients)]
        return f"{serve}; waiting for {shorten_names(missing)}"

    def _name(self, thing: str) -> str:
        client, _, task = thing.partition(".")
        return client if self._one_task else f"{client} in {task}"


def shorten_names(who: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(who) - MAX_NAMES} more" if len(who) > MAX_NAMES else ""
    return f"{', '.join(who[:MAX_NAMES])}{more}"


async def wait_until_serving(
    url: str, fed: FederationId, arrivals: StartupProgress, console: Console, *, began: datetime
) -> None:
    """Tell what is awaited until nothing is. *began*: when the start began."""
    async with Bus.connect(url, Identity(fed, AGENT)) as bus:
        await bus.create_streams()
        # a server goes on from where it was without a word; a client always begins anew
        wanted = [subjects.lifecycle(fed, kind, ">") for kind in ("server", "client")]
        async with bus.watch(lifecycle_stream(fed), wanted, since=began) as moves:
            for seen in await latest_transitions(bus, "server"):
                arrivals.see(transition_of(seen))
            with status_line(console) as tell:
                while not arrivals.all_there:
                    tell(str(arrivals))
                    arrivals.see(transition_of(await anext(moves)))
    took_s = (datetime.now(UTC) - began).total_seconds()
    console.print(f"{arrivals}, after {took_s:.1f} s", soft_wrap=True, highlight=False)
