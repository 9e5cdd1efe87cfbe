"""A task: one Flower app and how fedbus is to operate it, as its ``pyproject.toml`` says.

``[tool.flwr.app]`` is Flower's and stays as it is; ``[tool.fedbus]`` is read into `TaskTable`.
A name of a function or class is written ``module:name``, as in Flower's own table.
"""

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fedbus.contracts.identifiers import Id
from fedbus.contracts.run import RunPlan
from fedbus.contracts.scheduling import ContributionTable, EligibilityTable, ScheduleTable, SelectionTable
from fedbus.contracts.task.base import ConfigSection as _Table
from fedbus.contracts.task.base import ObjectReference
from fedbus.contracts.task.serving import CaptureTable, ChecksTable, ServingTable

__all__ = ["CodeTable", "GateTable", "RolloutTable", "ScheduleTable", "Stage", "Task", "TaskTable"]


class GateTable(_Table):
    """When what a run came to takes the place of the model that is served: where it is no worse, by *tolerance*."""

    metric: str = ""
    """Which figure of the last round; left out: the loss on the server's or the clients' test data, or the accuracy."""
    tolerance: float = Field(default=0.1, ge=0)
    """How much worse it may be, as a share of the served model's own figure."""
    higher_is_better: bool | None = None
    """Left out: by the metric's name, a loss or an error should be low and anything else high."""
    enabled: bool = True
    """false: every model whose figures are numbers is served."""


STAGE_PATTERN = (
    r"^(100|[1-9][0-9]?)%$|^[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+(,[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+)*$"
)
Stage: TypeAlias = Annotated[str, StringConstraints(pattern=STAGE_PATTERN)]
"""Part of the clients: ``25%`` of them, or those with the labels ``site=lab,board=jetson``."""


class RolloutTable(_Table):
    """How new code comes to the clients: stage by stage, each judged by a run; after the last, to everybody."""

    stages: tuple[Stage, ...] = Field(default=("100%",), min_length=1, max_length=20)
    """Who gets it, in order: a share of the clients, ``25%``, or those with labels, ``site=lab,board=jetson``."""
    wait_s: float = Field(default=300.0, gt=0)
    """How long the clients of a stage may take to have the code ready; then the run begins with those that have."""
    max_fail_rate: float = Field(default=0.25, ge=0, le=1)
    """Which share of the trainings, and of the clients, may fail or refuse before everybody goes back."""


class CodeTable(_Table):
    """What a device does with new code before it is used."""

    check: ObjectReference | None = None
    """Called without arguments in a process of its own; what it raises refuses the code."""
    check_s: float = Field(default=120.0, gt=0)
    """How long that may take."""
    install: tuple[str, ...] = ()
    """Requirements that a device installs beside the code, where it allows them: ``scikit-learn>=1.5``."""


class TaskTable(_Table):
    """``[tool.fedbus]``."""

    task: Id
    """Its name on the bus: lower-case letters, digits and hyphens."""
    model: ObjectReference
    """Makes the model: ``() -> torch.nn.Module``."""
    predict: ObjectReference | None = None
    """``(model, inputs: ndarray (n, …)) -> ndarray (n, …)``; left out: the class with the highest output."""
    samples: ObjectReference | None = None
    """``(partition_id, num_partitions) -> (inputs (n, …), labels (n,))``: probes for new models, and live traffic."""
    rounds: int = Field(default=3, ge=1)
    """Of each run."""
    quorum: int = Field(default=2, ge=1)
    """Clients that a run waits for before it trains."""
    recruit_s: float = Field(default=60.0, gt=0)
    """How long they may take to come; then the run is off, and says who was missing."""
    round_s: float = Field(default=600.0, gt=0)
    """How long a client may take over one message; then the round goes on without it."""
    aggregation: Literal["streaming", "stock"] = "streaming"
    """Whether updates are added up as they arrive, where the strategy is a weighted mean, or by Flower's own code."""
    keep_models: int = Field(default=20, ge=2)
    """How many versions keep their weights; of the others only the manifest is left."""
    eligibility: EligibilityTable = EligibilityTable()
    schedule: ScheduleTable = ScheduleTable()
    selection: SelectionTable = SelectionTable()
    contribution: ContributionTable = ContributionTable()
    gate: GateTable = GateTable()
    rollout: RolloutTable = RolloutTable()
    code: CodeTable = CodeTable()
    serving: ServingTable = ServingTable()
    capture: CaptureTable = CaptureTable()
    checks: ChecksTable = ChecksTable()

    @property
    def plan(self) -> RunPlan:
        """What a run is to be when nobody says otherwise."""
        return RunPlan(rounds=self.rounds, quorum=self.quorum, recruit_s=self.recruit_s, round_s=self.round_s)


LIBRARIES_SUFFIX: Final = ".libs"
"""Added to the directory of a task, it names the directory of what the task had installed for itself."""


class Task(BaseModel):
    """A task as read from its directory."""

    model_config = ConfigDict(frozen=True)

    table: TaskTable
    serverapp: ObjectReference
    clientapp: ObjectReference
    run_config: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """``[tool.flwr.app.config]``, flattened as Flower does: ``{"optimizer.lr": 0.1}``."""
    code_version: str
    """The commit SHA of a clean Git work tree, else ``sha256:`` and the digest of the files."""
    path: str
    libraries: str = ""
    """A directory with what the task had installed for itself; empty where it has nothing."""

    @property
    def id(self) -> str:
        return self.table.task
