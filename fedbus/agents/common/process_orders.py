"""What an agent tells a process that it starts: where the bus is, who it is, what it is to do.

Handed over as JSON in one environment variable, because an argument is seen by every user of
the machine, and standard input is the life line (see `child`).
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
MEMORY_ENVIRONMENT: Final = {
    # Buffers of weights come and go each round: keep their memory mapped, since the first touch of
    # fresh pages costs more than any copy (glibc; ignored elsewhere).
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}


class ProcessConfig(BaseModel):
    """What a process is to do, and where it finds the bus."""

    model_config = ConfigDict(frozen=True)

    nats_url: str
    federation: str
    task: Task
    creds: str = ""
    ca: str = ""
    """Files: see `fedbus.bus.credentials`. What is secret is in them alone."""
    home: str = ""
    """FEDBUS_HOME, where it is not what the environment says."""

    @property
    def access(self) -> BusAccess:
        return BusAccess(Path(self.creds) if self.creds else None, Path(self.ca) if self.ca else None)

    def identity(self, agent: str, owner: str = SERVER_SIDE) -> Identity:
        return Identity(FederationId(self.federation), agent, owner)

    def environment(self) -> dict[str, str]:
        """What the process finds it in."""
        home = {"FEDBUS_HOME": self.home} if self.home else {}
        return {PROCESS_CONFIG_VARIABLE: self.model_dump_json(), **home, **MEMORY_ENVIRONMENT}


def child_command(work: str) -> tuple[str, ...]:
    """The command of a child process that does *work*."""
    return module_command("fedbus", "child", work)


ProcessConfigT = TypeVar("ProcessConfigT", bound=ProcessConfig)


def read_process_config(kind: type[ProcessConfigT]) -> ProcessConfigT:
    """The order that this process was started with."""
    return kind.model_validate_json(os.environ[PROCESS_CONFIG_VARIABLE])


class InitProcessConfig(ProcessConfig):
    """Build the first model of the task and put it into *store*."""

    store: str


class CheckProcessConfig(ProcessConfig):
    """Try the task's code: import it, build its model, run its own check."""

    server_side: bool
    """Whether the ServerApp is to be tried as well."""
    like: str = ""
    """The file of the weights that its model should have the architecture of."""


class ServerProcessConfig(ProcessConfig):
    """Run the ServerApp of *run* from *first_round*, with the model *initial_sha256* of *store*."""

    run: str
    plan: RunPlan
    first_round: int
    initial_sha256: str
    store: str


class TrainerProcessConfig(ProcessConfig):
    """Train *run* as *client*."""

    client: str
    run: str
    plan: RunPlan
    node_config: dict[str, bool | int | float | str]
    captured: str
    """The database of captured predictions."""
