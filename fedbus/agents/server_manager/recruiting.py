"""Decides how long a run waits for its quorum, and when it gives up.

    STARTING –the app is loaded→ OPEN –deadline→ LOADING –clients still load the code→ EXTENDED –deadline→ OVER

Pure: events in, one decision out. `TrainingRun` turns the decision into effects.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import TypeAlias

from fedbus.agents.server_manager.events import RecruitsRead
from fedbus.contracts.client import FailTrain
from fedbus.contracts.run import RunPlan
from fedbus.domain.run_participation import recruiting_summary


class RecruitingPhase(Enum):
    """How far the recruiting of a run is."""

    STARTING = auto()
    """Its server has not loaded the app yet."""
    STARTING_LATE = auto()
    """The same, after the deadline."""
    OPEN = auto()
    LOADING = auto()
    """Its deadline has passed. The run waits only for clients that load the code."""
    EXTENDED = auto()
    """They have a deadline of their own."""
    OVER = auto()


@dataclass(frozen=True)
class ExtendDeadline:
    """Wait for another *delay_s*."""

    delay_s: float


@dataclass(frozen=True)
class ReadClients:
    """Read what the clients have published. Result: `RecruitsRead`."""


@dataclass(frozen=True)
class AppNotLoaded:
    """Fail the run: its server has not loaded the app in time."""

    reason: str


@dataclass(frozen=True)
class QuorumMissed:
    """Fail the run: *missing* clients of its quorum have not joined."""

    reason: str
    missing: int


RecruitingDecision: TypeAlias = ExtendDeadline | ReadClients | AppNotLoaded | QuorumMissed


class Recruiting:
    """The recruiting of one run. Clients may also join after it, while the run trains.

    Args:
        joined: The clients that have joined already.
        is_starting: True if the server has not loaded the app yet.

    """

    def __init__(self, joined: Iterable[str] = (), *, is_starting: bool = False) -> None:
        self._phase = RecruitingPhase.STARTING if is_starting else RecruitingPhase.OPEN
        self._deadline: datetime | None = None
        self._joined = dict.fromkeys(joined)
        self._known: frozenset[str] = frozenset()
        """The clients of the task, as they were read last; empty before that."""
        self._load_failures: set[str] = set()
        """The clients that cannot load the code of the run."""

    @property
    def joined(self) -> tuple[str, ...]:
        """The clients that have joined, in this order."""
        return tuple(self._joined)

    @property
    def deadline(self) -> datetime | None:
        """The end of the time to join, since the server has loaded the app; None before that."""
        return self._deadline

    def has_quorum(self, plan: RunPlan) -> bool:
        return len(self._joined) >= plan.quorum

    def open(self, plan: RunPlan, now: datetime) -> datetime:
        """Begin the time to join, and return its end."""
        self._phase = RecruitingPhase.OPEN
        self._deadline = now + timedelta(seconds=plan.recruit_s)
        return self._deadline

    def add(self, client: str) -> None:
        """Add a client that has joined with the code of the run; a repetition changes nothing."""
        self._joined[client] = None
        self._load_failures.discard(client)

    def on_deadline(self, plan: RunPlan) -> ExtendDeadline | ReadClients | AppNotLoaded:
        match self._phase:
            case RecruitingPhase.STARTING:
                self._phase = RecruitingPhase.STARTING_LATE
                return ExtendDeadline(plan.round_s)
            case RecruitingPhase.STARTING_LATE:
                return AppNotLoaded(
                    f"the server did not load the app within {plan.recruit_s + plan.round_s:g} s"
                )
            case RecruitingPhase.OPEN:
                self._phase = RecruitingPhase.LOADING
            case _:
                self._phase = RecruitingPhase.OVER
        return ReadClients()

    def on_fail_train(self, message: FailTrain, plan: RunPlan) -> ReadClients | None:
        """Read the clients again if this failure may make the quorum impossible."""
        if message.load_failed:
            self._load_failures.add(message.client)
        is_possible = len(self._known - self._load_failures) >= plan.quorum
        is_waiting = self._phase in (RecruitingPhase.LOADING, RecruitingPhase.EXTENDED, RecruitingPhase.OVER)
        return ReadClients() if is_waiting or not is_possible else None

    def on_recruits_read(self, event: RecruitsRead, plan: RunPlan) -> ExtendDeadline | QuorumMissed | None:
        """Give up if the quorum cannot join, or has not joined in time.

        After the deadline, wait for clients that still load the code, as long as for one message.
        """
        joined = set(self._joined)
        failures = {client: why for client, why in event.load_failures.items() if client not in joined}
        declined = {client: why for client, why in event.declined.items() if client not in joined}
        self._known = frozenset(event.known | joined)
        self._load_failures = set(failures)
        loading = event.loading - joined - failures.keys()
        match self._phase:
            case RecruitingPhase.OPEN if len(self._known - failures.keys()) >= plan.quorum:
                return None
            case RecruitingPhase.LOADING if len(joined | loading) >= plan.quorum:
                self._phase = RecruitingPhase.EXTENDED
                return ExtendDeadline(plan.round_s)
            case RecruitingPhase.EXTENDED if len(joined | loading) >= plan.quorum:
                return None
            case _:
                reason = recruiting_summary(list(self._joined), plan.quorum, declined, failures)
                return QuorumMissed(reason, plan.quorum - len(joined))
