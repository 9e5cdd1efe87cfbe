"""The federation at a glance, folded from what is said: for `fedbus top`.

    overview = Overview()
    overview.see(seen)            a transition, or a word of a client
    overview.hear(report, at)     what is overheard: heartbeats, and how devices are
    overview.sorted("cpu")        the clients, each in each of its tasks

Nothing here waits, draws or looks at a clock.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from fedbus.bus.bus import StoredMessage
from fedbus.contracts import subjects
from fedbus.contracts.client import (
    ClientDeclined,
    ClientJoined,
    ClientState,
    FailTrain,
    FlClientState,
    Heartbeat,
)
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import Message
from fedbus.contracts.run import RUN, RunData, RunState
from fedbus.contracts.transition import Transition

CLIENT_LIFECYCLES: Final = frozenset({"client", "fl_client", "inference"})
NOTE_MESSAGES: Final[tuple[type[Message], ...]] = (ClientJoined, ClientDeclined, FailTrain)
"""The words that tell why a client does not train: of each the last one counts."""
RATE_WINDOW_S: Final = 10.0
"""Over how long the rate of events is taken."""
LOWEST: Final = float("-inf")


@dataclass
class ClientStatus:
    """One client in one task."""

    client: str
    task: str
    moves: dict[str, Transition] = field(default_factory=dict)
    """The last of each of its three lifecycles."""
    no: ClientDeclined | FailTrain | None = None
    """Why it was not in a run, or out of it, since it last joined one."""
    noted_at: datetime | None = None

    def state(self, kind: str) -> str:
        return self.moves[kind].target if kind in self.moves else ""

    @property
    def trains(self) -> bool:
        return self.state("fl_client") in (FlClientState.PENDING, FlClientState.TRAINING)

    @property
    def model_version(self) -> int | None:
        """What it answers with, else what it is about to."""
        models = [
            getattr(self.moves[kind].facts, "model", None)
            for kind in ("inference", "client")
            if kind in self.moves
        ]
        return next((model.version for model in models if model), None)

    @property
    def code_version(self) -> str:
        return getattr(self.moves["client"].facts, "code_version", "") if "client" in self.moves else ""

    def note(self, message: Message, at: datetime) -> None:
        """Remember a no; who joins has said yes since."""
        if self.noted_at is None or at >= self.noted_at:
            self.noted_at = at
            self.no = message if isinstance(message, ClientDeclined | FailTrain) else None


class EventRate:
    """How many came in the last seconds; costs one number a second."""

    def __init__(self, over_s: float = RATE_WINDOW_S) -> None:
        self._over_s = over_s
        self._counts: deque[tuple[int, int]] = deque()
        self._begin: float | None = None

    def count(self, now: float) -> None:
        self._begin = now if self._begin is None else self._begin
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = (second, self._counts[-1][1] + 1)
        else:
            self._counts.append((second, 1))

    def per_s(self, now: float) -> float:
        while self._counts and self._counts[0][0] < now - self._over_s:
            self._counts.popleft()
        watched_s = min(self._over_s, max(1.0, now - self._begin)) if self._begin is not None else 1.0
        return sum(count for _, count in self._counts) / watched_s


class FederationOverview:
    """Servers, runs and clients as they are now."""

    def __init__(self) -> None:
        self.members: dict[str, ClientStatus] = {}
        self.servers: dict[str, Transition] = {}
        self.heard: dict[str, datetime] = {}
        """When each client was last heard of."""
        self.devices: dict[str, DeviceReport] = {}
        self._runs: dict[str, Transition] = {}

    # --- taking in ----------------------------------------------------------------------------

    def see(self, seen: StoredMessage) -> None:
        """Take in what a stream holds."""
        message, at = seen.message, seen.envelope.time
        speaker = seen.envelope.source.rpartition("/")[2]
        if speaker not in subjects.RESERVED_OWNERS:
            self._heard_of(speaker, at)
        match message:
            case Transition():
                self._moved(message)
            case ClientJoined() | ClientDeclined() | FailTrain():
                self._member(message.client, message.task).note(message, at)

    def hear(self, message: Message, at: datetime) -> None:
        """Take in what is overheard."""
        match message:
            case DeviceReport():
                self.devices[message.client] = message
                self._heard_of(message.client, at)
            case Heartbeat():
                self._heard_of(message.client, at)

    def _moved(self, move: Transition) -> None:
        if move.kind == "server":
            self.servers[move.task] = move
        elif move.kind == RUN.kind:
            self._runs[move.thing] = move
        elif move.kind in CLIENT_LIFECYCLES:
            self._member(move.thing.partition(".")[0], move.task).moves[move.kind] = move

    def _member(self, client: str, task: str) -> ClientStatus:
        return self.members.setdefault(f"{client}.{task}", ClientStatus(client, task))

    def _heard_of(self, client: str, at: datetime) -> None:
        self.heard[client] = max(at, self.heard.get(client, at))

    # --- telling --------------------------------------------------------------------------------

    @property
    def under_way(self) -> list[Transition]:
        """The runs that are not over, oldest first."""
        return [
            move
            for _, move in sorted(self._runs.items(), key=lambda one: natural_key(one[0]))
            if move.target not in RUN.final
        ]

    def run_of(self, task: str) -> str | None:
        """The run of *task* that is under way."""
        return next((move.thing for move in reversed(self.under_way) if move.task == task), None)

    @property
    def last_run(self) -> Transition | None:
        """The newest run that there was, however it ended."""
        runs = [move for move in self._runs.values() if isinstance(move.facts, RunData)]
        return max(runs, key=lambda move: move.facts.requested_at, default=None)  # type: ignore[union-attr]

    @property
    def training(self) -> int:
        return sum(one.trains for one in self.members.values())

    def why(self, one: ClientStatus) -> str:
        """Why *one* does not train, in a few words; nothing where it does."""
        state, run = one.state("client"), self.run_of(one.task)
        if one.trains:
            return ""
        if state == ClientState.TERMINATED:
            return f"gave up: {one.moves['client'].reason}"
        if state == ClientState.S0:
            return "begins: waits for the server and the models"
        if one.no is not None and run in (None, one.no.run):
            return f"{'declined' if isinstance(one.no, ClientDeclined) else 'failed in'} {one.no.run}: {one.no.reason}"
        if state == ClientState.SYNCING:
            return "gets other code ready"
        if state == ClientState.PENDING_APPLICATION:
            return "takes a new model"
        if run is None:
            return "no run is under way"
        recruits = self._runs[run].target in (RunState.REQUESTED, RunState.RECRUITING)
        return f"has not joined {run} yet" if recruits else f"is not in {run}"

    def sorted(self, by: str, *, reverse: bool = False) -> list[ClientStatus]:
        """All clients, by a key of `SORTS`; those of equal rank by their names."""
        key = SORT_KEYS[by]
        in_order = sorted(self.members.values(), key=lambda one: natural_key(f"{one.client}.{one.task}"))
        return sorted(in_order, key=lambda one: key(self, one), reverse=reverse)

    def usage(self, one: ClientStatus, what: str) -> float | None:
        """A figure of the last report of its device: ``cpu``, ``memory``, ``temperature_c``."""
        report = self.devices.get(one.client)
        return None if report is None else getattr(report, what)


SortKey = Callable[[FederationOverview, ClientStatus], Any]

SORT_KEYS: Final[dict[str, SortKey]] = {
    "name": lambda _, one: natural_key(f"{one.client}.{one.task}"),
    "state": lambda _, one: (one.state("client"), one.state("fl_client")),
    "training": lambda _, one: (not one.trains, one.state("fl_client")),
    "model": lambda _, one: one.model_version or 0,
    "cpu": lambda overview, one: -_or_lowest(overview.usage(one, "cpu")),
    "memory": lambda overview, one: -_or_lowest(overview.usage(one, "memory")),
    "heat": lambda overview, one: -_or_lowest(overview.usage(one, "temperature_c")),
    "seen": lambda overview, one: (
        overview.heard[one.client].timestamp() if one.client in overview.heard else 0.0
    ),
    "why": lambda overview, one: (one.trains, overview.why(one)),
}
"""What clients can be sorted by; what is busiest, hottest, oldest or trains comes first."""


def natural_key(name: str) -> list[tuple[int, str]]:
    """So that c10 comes after c9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _or_lowest(figure: float | None) -> float:
    return LOWEST if figure is None else figure
