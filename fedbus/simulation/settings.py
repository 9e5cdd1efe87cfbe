"""The input and the result of a simulation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan, Scalar
from fedbus.contracts.task.task import Task
from fedbus.learning.data.client_data import DATA_DIR, NUM_PARTITIONS, PARTITION, PARTITION_SEED
from fedbus.learning.weights import Arrays
from fedbus.simulation.profiles.schema import Profile

MIN_NAME_DIGITS: Final = 4

EngineName = Literal["local", "ray"]


class BadSettings(ValueError):
    """The settings of a simulation are invalid. The text names the setting and what to do."""


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """What is simulated, and on what."""

    task: Task
    clients: int = 10
    """The number of virtual clients."""
    cohort: int | None = None
    """The number of clients that train in a round, chosen at random by *seed*. At most as many evaluate. None: the
    strategy's own sampling."""
    rounds: int | None = None
    """None: the number of the task."""
    seed: int | None = 0
    """The seed of cohorts and of the random generators of the app; None: none is set."""
    deterministic: bool = False
    """Aggregate in client order, without partial sums: the same bits for any number of workers."""
    workers: int | None = None
    """The number of worker processes; None: one for each core that this process may use."""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    """Overrides of the app's run configuration."""
    aggregation: Mapping[str, Scalar] = field(default_factory=dict)
    """Overrides of the keys of ``[tool.fedbus.aggregation]``, such as the mode."""
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """Values for the node configuration of each client."""
    partition: str | None = None
    """How data are divided between the clients, such as ``dirichlet:0.3``: for the app's node configuration."""
    data_dir: Path | None = None
    """The directory with the data sets, for the app's node configuration."""
    model: Arrays | None = None
    """The model that the run starts from; None: that of the task's model builder, or the app's own."""
    first_round: int = 1
    """Greater than 1 if a simulation resumes. Then *model* is the model after the round before it."""
    run: str = "simulation"
    """The name of the run, on which the sampling of some libraries depends."""
    round_s: float | None = None
    """The time limit of one message; None: that of the task."""
    profile: Profile | Path | str | None = None
    """A profile of the clients' conditions: delays, speeds, absences. With one, the clock of the run is virtual."""
    gpus: tuple[str, ...] = ()
    """GPUs that the workers share, as ``CUDA_VISIBLE_DEVICES`` names them. Empty: the workers use none."""
    engine: EngineName = "local"
    ray_address: str | None = None
    """The address of an existing Ray cluster, for the engine ``ray``."""
    state_dir: Path | None = None
    """The directory for state of idle clients when memory is short; None: a temporary one."""
    log_file: Path | None = None
    """The file for the output of the workers, of the app and in the log; None: that of this process."""
    memory_share: float = 0.9
    """The share of this machine's memory in use, above which the state of idle clients moves to disk."""

    def __post_init__(self) -> None:
        _check_positive("clients", self.clients)
        _check_positive("cohort", self.cohort)
        _check_positive("rounds", self.rounds)
        _check_positive("workers", self.workers)
        _check_positive("first_round", self.first_round)
        if self.cohort is not None and self.cohort > self.clients:
            raise BadSettings(
                f"the cohort has {self.cohort} clients (limit {self.clients}, the number of clients). "
                "Choose a smaller cohort, or more clients"
            )

    @property
    def plan(self) -> RunPlan:
        """The plan of the run. All clients are present from the start, so there is no quorum."""
        overrides = RunOverrides(
            rounds=self.rounds,
            quorum=1,
            round_s=self.round_s,
            config=dict(self.config),
            aggregation=dict(self.aggregation),
            seed=self.seed,
            deterministic=self.deterministic,
        )
        return self.task.plan_run(overrides)

    @property
    def worker_count(self) -> int:
        """The number of workers: no more than clients."""
        return min(self.workers or usable_cores(), self.clients)

    @property
    def client_names(self) -> list[str]:
        """The names of the clients, in the order of their partitions: ``client-0000`` …"""
        return [client_name(index, self.clients) for index in range(self.clients)]

    @property
    def shared_node_config(self) -> dict[str, Scalar]:
        """The node configuration that all clients share."""
        values: dict[str, Scalar] = {NUM_PARTITIONS: self.clients}
        if self.partition is not None:
            values[PARTITION] = self.partition
            values[PARTITION_SEED] = self.seed or 0
        if self.data_dir is not None:
            values[DATA_DIR] = str(self.data_dir.resolve())
        return {**values, **self.node_config}


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """The result of a simulation."""

    rounds: list[RoundResult]
    """The result of each round. Round 0 is the evaluation of the initial model, if the app makes one."""
    model: Arrays
    """The final model; empty if the app ended without one."""
    seconds: float
    """From the start to the end, with the import of the app."""
    simulated_s: float
    """The duration on the clock of the run, which a profile makes virtual."""
    peak_memory_bytes: int
    """The largest sum of the proportional memory of all processes of the simulation that was measured."""
    lost_workers: int = 0
    """Workers that died, and were replaced."""


def client_name(index: int, clients: int) -> str:
    """Return the name of client number *index* of *clients*."""
    digits = max(MIN_NAME_DIGITS, len(str(clients - 1)))
    return f"client-{index:0{digits}}"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise BadSettings(f"{name} is {value}. Use a number of at least 1")
