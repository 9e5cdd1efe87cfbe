"""A task: an app of a training library and its configuration for fedbus, both in its ``pyproject.toml``.

The library reads its own tables; fedbus parses ``[tool.fedbus]`` into `TaskTable`. References to functions and
classes have the form ``module:name``.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fedbus.contracts.identifiers import Id
from fedbus.contracts.run import RunOverrides, RunPlan
from fedbus.contracts.scheduling import ContributionTable, EligibilityTable, ScheduleTable, SelectionTable
from fedbus.contracts.task.aggregation import AggregationTable
from fedbus.contracts.task.base import ConfigSection as _Table
from fedbus.contracts.task.base import ModuleName, ObjectReference
from fedbus.contracts.task.compression import CompressionTable
from fedbus.contracts.task.serving import CaptureTable, ChecksTable, ServingTable
from fedbus.contracts.task.superlink import SuperLinkTable

__all__ = ["CodeTable", "GateTable", "RolloutTable", "ScheduleTable", "Stage", "Task", "TaskTable"]


class GateTable(_Table):
    """The condition for the promotion of a run's result: it is not worse than the champion by more than *tolerance*."""

    metric: str = ""
    """The metric of the last round to compare. Default: the loss on the server's or the clients' test data, else the
    accuracy."""
    tolerance: float = Field(default=0.1, ge=0)
    """How much worse the candidate may be, as a share of the champion's metric."""
    higher_is_better: bool | None = None
    """Whether a higher value of the metric is better. Default: by its name. It is false for loss, error,
    perplexity, mse, mae and rmse, and true for all others."""
    enabled: bool = True
    """If false, every candidate whose metrics are finite is promoted."""


DEFAULT_LIBRARY: Final = "flower"

STAGE_PATTERN = (
    r"^(100|[1-9][0-9]?)%$|^[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+(,[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+)*$"
)
Stage: TypeAlias = Annotated[str, StringConstraints(pattern=STAGE_PATTERN)]
"""A part of the clients: a share (``25%``), or those with all labels (``site=lab,board=jetson``)."""


class RolloutTable(_Table):
    """How new code is rolled out to the clients: in stages, with a trial run in each."""

    stages: tuple[Stage, ...] = Field(default=("100%",), min_length=1, max_length=20)
    """The clients of each stage: a share (``25%``), or those with all labels (``site=lab,board=jetson``)."""
    wait_s: float = Field(default=300.0, gt=0)
    """How long a stage waits for its clients to prepare the code. Then the trial run starts with those that are
    ready."""
    max_fail_rate: float = Field(default=0.25, ge=0, le=1)
    """The maximum share of failed trainings in the trial run, and of clients that reject the code. Above it, the
    rollout is reverted."""


class CodeTable(_Table):
    """What a device does with new code before it uses it."""

    check: ObjectReference | None = None
    """A function without arguments that runs in a process of its own. The device rejects the code if it raises."""
    check_s: float = Field(default=120.0, gt=0)
    """The time limit of *check*."""
    install: tuple[str, ...] = ()
    """Requirements that a device installs in addition to the code, if it allows them: ``scikit-learn>=1.5``."""


class TaskTable(_Table):
    """``[tool.fedbus]``."""

    task: Id
    """The task's id: lower-case letters, digits and hyphens."""
    library: Annotated[str, StringConstraints(min_length=1, max_length=100)] = DEFAULT_LIBRARY
    """The library for federated learning that runs the app: the name of an installed one."""
    model: ObjectReference | None = None
    """Builds the model: ``() -> torch.nn.Module``, or a dict or a list of arrays. Default: the first version is empty,
    and the first run begins with the arrays that the app itself begins with."""
    predict: ObjectReference | None = None
    """Computes predictions: ``(model, inputs: ndarray (n, …)) -> ndarray (n, …)``. *model* is the torch module of
    `model`, else the dict of arrays. Default, for a torch module: the class with the highest output, or the output
    itself if the model has one output. Without a torch module and without `predict`, a device trains and does not
    serve."""
    functions: ModuleName | None = None
    """The module with the functions ``load``, ``train`` and ``evaluate``, for the library `functions`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The run configuration, for a library whose app has none of its own: numbers, strings, true or false. Nested
    tables are flattened: ``optimizer.lr``."""
    samples: ObjectReference | None = None
    """Loads labelled samples: ``(partition_id, num_partitions) -> (inputs (n, …), labels (n,))``. They are the probes
    for new models and the inputs of simulated traffic."""
    architecture: Literal["fixed", "free"] = "free"
    """``fixed``: a run fails if its app changes the name, the shape or the dtype of an array. ``free``: such a result
    becomes a version, for example trees that grow, and the next run begins with it."""
    rounds: int | None = Field(default=None, ge=1, le=100_000)
    """The number of rounds of a run, which replaces the app's own number. Default: the app's own number."""
    quorum: int = Field(default=2, ge=1)
    """The number of clients that a run needs before it trains."""
    recruit_s: float = Field(default=60.0, gt=0)
    """How long a run waits for its quorum, from the start of its server. It waits up to `round-s` longer for clients
    that still import the code."""
    round_s: float = Field(default=600.0, gt=0)
    """The time limit of a client for one message. After it the round continues without the client."""
    keep_models: int = Field(default=20, ge=2)
    """The number of versions that keep their weights. Older versions keep only their manifest."""
    eligibility: EligibilityTable = EligibilityTable()
    aggregation: AggregationTable = AggregationTable()
    compression: CompressionTable = CompressionTable()
    schedule: ScheduleTable = ScheduleTable()
    selection: SelectionTable = SelectionTable()
    contribution: ContributionTable = ContributionTable()
    gate: GateTable = GateTable()
    rollout: RolloutTable = RolloutTable()
    code: CodeTable = CodeTable()
    serving: ServingTable = ServingTable()
    capture: CaptureTable = CaptureTable()
    checks: ChecksTable = ChecksTable()
    superlink: SuperLinkTable = SuperLinkTable()


LIBRARIES_SUFFIX: Final = ".libs"
"""Suffix of the directory with the installed requirements of a task, next to the directory of the task."""


class Task(BaseModel):
    """A task as loaded from its directory."""

    model_config = ConfigDict(frozen=True)

    table: TaskTable
    app: dict[str, ObjectReference] = Field(default_factory=dict)
    """The app's own objects by role, as its library declares them: ``{"clientapp": "my_app.client:app"}``."""
    run_config: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """The app's own configuration, as its library reads it: ``{"optimizer.lr": 0.1}``."""
    app_rounds: int = 0
    """The number of rounds that the app declares; 0 if it declares none."""
    rounds_key: str = ""
    """The key of the run configuration that has this number; empty if none has it."""
    code_version: str
    """The commit SHA of a clean Git work tree, else ``sha256:`` and the digest of the files."""
    path: str
    libraries: str = ""
    """The directory with the installed requirements of the task; empty if it has none."""

    @property
    def id(self) -> str:
        return self.table.task

    @property
    def predict(self) -> ObjectReference | None:
        """The function that computes predictions: that of ``[tool.fedbus]``, else that of the app."""
        return self.table.predict or self.app.get("predict")

    def plan_run(self, overrides: RunOverrides | None = None) -> RunPlan:
        """Return the plan of a run with *overrides*."""
        table = self.table
        plan = RunPlan(
            rounds=table.rounds or 0,
            app_rounds=self.app_rounds,
            quorum=table.quorum,
            recruit_s=table.recruit_s,
            round_s=table.round_s,
        )
        plan = overrides.apply_to(plan) if overrides is not None else plan
        match plan.config.get(self.rounds_key):
            case bool():
                return plan
            case int(rounds) if rounds > 0:
                return plan.model_copy(update={"app_rounds": rounds})
            case _:
                return plan
