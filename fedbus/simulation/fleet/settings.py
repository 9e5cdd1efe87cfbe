"""The input and the result of a simulated fleet."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from fedbus.agents.client_manager.machine import BOOTSTRAP_S
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.scheduling import ScheduleOverrides
from fedbus.contracts.task.task import Task
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.settings import BadSettings, client_name

FEDERATION: Final = FederationId("fleet")
DEFAULT_ROUNDS: Final = 3
MINUTE_S: Final = 60.0
HOUR_S: Final = 3600.0
EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""The time at which virtual time begins, unless a simulation sets another."""


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """A fleet, and for how long it is simulated. All times are virtual seconds."""

    task: Task
    clients: int = 1000
    duration_s: float = HOUR_S
    profile: Profile | None = None
    """Network, speed and absences of the clients; None: all are always connected, equally fast, without delays."""
    seed: int = 0
    """Determines everything: two simulations with equal settings have the same transition log."""
    cohort: int | None = None
    """The number of clients that train in a round, chosen at random; None: all that have joined."""
    rounds: int | None = None
    """The rounds of a run; None: the number of the task."""
    quorum: int | None = None
    """The clients that must have joined before a run trains; None: a quarter of the fleet, at most the cohort."""
    recruit_s: float | None = None
    """None: the time of the task."""
    round_s: float | None = None
    """The limit of one message to a client; None: the time of the task."""
    every_s: float | None = None
    """The pause between two runs; None: the schedule of the task, else 10 minutes."""
    schedulers: int = 1
    """Workflow schedulers, of which one leads."""
    start_within_s: float = MINUTE_S
    """The devices start at random times within this."""
    train_s: float = 10.0
    """The time of one training, which the profile changes by the speed of the device."""
    samples: int = 100
    """The training samples of each client."""
    model_bytes: int = 250_000
    """The size of the model, for the times of downloads and uploads."""
    load_s: float = 2.0
    """The time until a trainer or a server session has loaded the app."""
    bootstrap_s: float = BOOTSTRAP_S
    """The limit for the enrollment of a device, and for its first model."""
    serve_s: float = 0.5
    """The time until the inference agent serves a model."""
    starts_at: datetime = EPOCH
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (
            ("clients", self.clients),
            ("cohort", self.cohort),
            ("rounds", self.rounds),
            ("quorum", self.quorum),
            ("duration_s", self.duration_s),
        ):
            if value is not None and value <= 0:
                raise BadSettings(f"{name} is {value:g}. Use a number greater than 0")
        for name, number in (("cohort", self.cohort), ("quorum", self.quorum)):
            if number is not None and number > self.clients:
                raise BadSettings(
                    f"the {name} has {number} clients (limit {self.clients}, the number of clients). "
                    f"Choose a smaller {name}, or more clients"
                )

    @property
    def client_names(self) -> list[str]:
        return [client_name(index, self.clients) for index in range(self.clients)]

    @property
    def run_overrides(self) -> RunOverrides:
        quorum = self.quorum or max(1, min(self.clients // 4, self.cohort or self.clients))
        own = self.task.plan_run()
        rounds = self.rounds or (None if own.total_rounds else DEFAULT_ROUNDS)
        return RunOverrides(rounds=rounds, quorum=quorum, recruit_s=self.recruit_s, round_s=self.round_s)

    @property
    def schedule_overrides(self) -> ScheduleOverrides:
        if self.every_s is None and self.task.table.schedule.rule is not None:
            return ScheduleOverrides()
        return ScheduleOverrides(every_s=self.every_s or 10 * MINUTE_S)


@dataclass(frozen=True, kw_only=True)
class FleetRun:
    """One run of the fleet."""

    run: str
    state: str
    """The state of its lifecycle at the end of the simulation."""
    reason: str = ""
    """Why it ended, if it failed."""
    requested_at_s: float
    ended_at_s: float | None
    """None if it was active at the end of the simulation. Seconds since the start, as above."""
    rounds: int
    joined: int
    """Clients of its cohort."""
    trainings: int
    """Trainings, summed over clients and rounds, including failed ones."""
    failures: int
    """Trainings that failed."""


@dataclass(frozen=True, kw_only=True)
class FleetResult:
    """What a simulated fleet did."""

    clients: int
    runs: list[FleetRun]
    transitions: Counter[tuple[str, str]]
    """The number of transitions into each state, by kind of lifecycle and state."""
    messages: int
    """Stored messages: events and transitions."""
    restarts: int
    """Agents that ended with an error or crashed, and were started again."""
    simulated_s: float
    seconds: float
    """The real duration."""
    peak_memory_bytes: int
    log_sha256: str
    """The digest of the transition log: equal for equal settings."""

    @property
    def messages_per_second(self) -> float:
        """Stored messages for each real second."""
        return self.messages / self.seconds if self.seconds else 0.0

    @property
    def participation(self) -> float:
        """The share of trainings that succeeded; 0 if there were none."""
        trainings = sum(one.trainings for one in self.runs)
        failures = sum(one.failures for one in self.runs)
        return (trainings - failures) / trainings if trainings else 0.0


@dataclass(frozen=True)
class FleetProgress:
    """How far a simulation is."""

    simulated_s: float
    duration_s: float
    messages: int
    run: str
    """The run whose transition was the last."""
