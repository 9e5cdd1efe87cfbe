"""Configurations of the processes that agents start: the bus, the identity, and the work.

They are passed as JSON in one environment variable: arguments are visible to every user of the machine, and standard
input is the lifeline (see `child_process`).
"""

import os
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict

from fedbus.agents.common.child_process import module_command
from fedbus.bus.bus import Identity
from fedbus.bus.credentials import BusAccess
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.run import RunPlan
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.task.task import Task

PROCESS_CONFIG_VARIABLE: Final = "FEDBUS_ORDER"
LOAD_FAILED_EXIT_CODE: Final = 78
"""The exit code of a trainer that could not load the task's code: EX_CONFIG of sysexits.h."""
MEMORY_ENVIRONMENT: Final = {
    # Buffers of weights are allocated and freed in each round. Keep their memory mapped: the page faults of new
    # pages cost more than copying (glibc; ignored elsewhere).
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}


class ProcessConfig(BaseModel):
    """The configuration of a child process."""

    model_config = ConfigDict(frozen=True)

    nats_url: str
    federation: str
    task: Task
    creds: str = ""
    ca: str = ""
    """Paths of the credentials and CA files (see `fedbus.bus.credentials`); the configuration contains no secret."""
    proxied_host: str = ""
    """See `BusAccess.proxied_host`."""
    home: str = ""
    """FEDBUS_HOME, if it differs from the environment."""

    @property
    def bus_access(self) -> BusAccess:
        return BusAccess(
            Path(self.creds) if self.creds else None, Path(self.ca) if self.ca else None, self.proxied_host
        )

    def identity(self, agent: str, owner: str = SERVER_SIDE) -> Identity:
        return Identity(FederationId(self.federation), agent, owner)

    def environment(self) -> dict[str, str]:
        """Return the environment variables for the process."""
        home = {"FEDBUS_HOME": self.home} if self.home else {}
        return {PROCESS_CONFIG_VARIABLE: self.model_dump_json(), **home, **MEMORY_ENVIRONMENT}


def child_command(work: str) -> tuple[str, ...]:
    """Return the command of the child process *work*."""
    return module_command("fedbus", "child", work)


ProcessConfigT = TypeVar("ProcessConfigT", bound=ProcessConfig)


def read_process_config(kind: type[ProcessConfigT]) -> ProcessConfigT:
    """Read the configuration that this process was started with."""
    return kind.model_validate_json(os.environ[PROCESS_CONFIG_VARIABLE])


class InitProcessConfig(ProcessConfig):
    """Build the first model of the task and write it to *store*."""

    store: str


class CheckProcessConfig(ProcessConfig):
    """Check the task's code: import it, build its model, run its own check."""

    server_side: bool
    """True to check the server side of the app too."""
    like: str = ""
    """A weights file whose architecture the model should have."""


class ServerProcessConfig(ProcessConfig):
    """Run the server session of *run* from *first_round*, with the model *initial_sha256* of *store*."""

    run: str
    plan: RunPlan
    first_round: int
    initial_sha256: str
    store: str


class WorkConditions(BaseModel):
    """How long a device takes for messages of one phase, training or evaluation, under a profile."""

    model_config = ConfigDict(frozen=True)

    slowdown: float = 1.0
    """The factor of the measured time."""
    seconds: tuple[float, ...] = ()
    """Instead of the measured time, if that is shorter: one value for each message of the run, used in turn."""
    seconds_per_sample: float = 0.0
    """Instead of the measured time, if that is shorter and *seconds* is empty; 0 is the measured time."""

    def work_s(self, number: int, measured_s: float, samples: int) -> float:
        """Return the time for message *number*, which is not shorter than the measured one."""
        wanted_s = self.slowdown * measured_s
        if self.seconds:
            wanted_s = self.seconds[number % len(self.seconds)]
        elif self.seconds_per_sample:
            wanted_s = self.seconds_per_sample * samples
        return max(measured_s, wanted_s)


class TrainerConditions(BaseModel):
    """What a profile does to the messages of a run in their trainer: delays, and messages that are lost for ever.

    Sequences have one value for each message of the run, in the order of arrival; they are used in turn.
    """

    model_config = ConfigDict(frozen=True)

    training: WorkConditions = WorkConditions()
    evaluation: WorkConditions = WorkConditions()
    delays_s: tuple[float, ...] = (0.0,)
    """The delay after a training, before the reply is sent."""
    lost_messages: tuple[bool, ...] = (False,)
    """The message is lost: the trainer ignores it."""
    lost_replies: tuple[bool, ...] = (False,)
    """The reply is lost: the trainer works and does not send it."""

    def loses_message(self, number: int) -> bool:
        return self.lost_messages[number % len(self.lost_messages)]

    def loses_reply(self, number: int) -> bool:
        return self.lost_replies[number % len(self.lost_replies)]

    def delay_s(self, number: int) -> float:
        return self.delays_s[number % len(self.delays_s)]


class TrainerProcessConfig(ProcessConfig):
    """Train *run* as *client*."""

    client: str
    run: str
    plan: RunPlan
    node_config: dict[str, bool | int | float | str]
    captured: str
    """The database of captured predictions."""
    conditions: TrainerConditions | None = None
    """The conditions of the device under a profile; None without one."""
