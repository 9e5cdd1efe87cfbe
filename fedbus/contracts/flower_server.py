"""The messages between the server manager and the Flower server agent, which executes a run and reports on it."""

from typing import ClassVar

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import Id
from fedbus.contracts.message import Body, Family, Message, Request
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RoundResult, RunPlan


class ModelInitialised(Body):
    """Reply to `init_model`: the artifact is stored in the model repository, but is not a version yet."""

    artifact: Artifact


class InitModel(Request[ModelInitialised]):
    """Request to build the task's initial model and to store it."""

    name: ClassVar[str] = "init_model"
    responder: ClassVar[AgentName] = AgentName.FLOWER_SERVER

    code_version: str = ""


class ServerStarting(Body):
    """Reply to `start_server`: the process is starting."""


class StartServer(Request[ServerStarting]):
    """Request to start the Flower server of *run* at *first_round*, from the model in *artifact*."""

    name: ClassVar[str] = "start_server"
    responder: ClassVar[AgentName] = AgentName.FLOWER_SERVER

    run: Id
    plan: RunPlan
    artifact: Artifact
    first_round: int = Field(default=1, ge=1)
    code_version: str = ""
    """The code version of the app; empty: the one that the agent already has."""


class ServerStopped(Body):
    """Reply to `stop_server`: the process has ended."""


class StopServer(Request[ServerStopped]):
    """Request to stop the Flower server of *run*, if it is running."""

    name: ClassVar[str] = "stop_server"
    responder: ClassVar[AgentName] = AgentName.FLOWER_SERVER

    run: Id


class ServerFound(Body):
    """Reply to `find_server`. *up* is true if the Flower server is running."""

    up: bool


class FindServer(Request[ServerFound]):
    """Request to find out if the Flower server of *run* is running, for example after a restart of the requester."""

    name: ClassVar[str] = "find_server"
    responder: ClassVar[AgentName] = AgentName.FLOWER_SERVER

    run: Id
    say_so: bool = False
    """If true and the Flower server has ended, the agent also publishes `server_lost`, after all messages that the
    Flower server had published itself."""


class ServerStarted(Message):
    """The Flower server of *run* is running, and clients may join."""

    name: ClassVar[str] = "server_started"
    family: ClassVar[Family] = Family.SRV

    run: Id


class BeginTraining(Message):
    """Command to begin training, because the quorum has joined. Clients that join later take part too."""

    name: ClassVar[str] = "begin_training"
    family: ClassVar[Family] = Family.SRV

    run: Id
    cohort: tuple[str, ...]


class RoundFinished(Message):
    """A round has finished. *checkpoint* is the global model after it."""

    name: ClassVar[str] = "round_finished"
    family: ClassVar[Family] = Family.SRV

    run: Id
    round: int = Field(ge=0)
    result: RoundResult
    checkpoint: Artifact | None = None


class RunFinished(Message):
    """All rounds of *run* have finished, and the result is stored in *artifact*. It can become a version.

    A run that ends without arrays, such as federated analytics, has the artifact that it started from. *rounds* is the
    number of rounds that the app reported.
    """

    name: ClassVar[str] = "run_finished"
    family: ClassVar[Family] = Family.SRV

    run: Id
    artifact: Artifact
    rounds: int


class RunFailed(Message):
    """The server session of *run* has failed. The champion does not change."""

    name: ClassVar[str] = "run_failed"
    family: ClassVar[Family] = Family.SRV

    run: Id
    reason: str


class ServerLost(Message):
    """The Flower server of *run* has probably ended without a report. Verify with `find_server` before acting on it."""

    name: ClassVar[str] = "server_lost"
    family: ClassVar[Family] = Family.SRV

    run: Id
    reason: str
