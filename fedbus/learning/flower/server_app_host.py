"""Runs a task's ServerApp unmodified in this process, from the stored model to the final model.

An app with a Flower strategy needs no change: hooks inject the model and take the result. An app with its own
loop reads the model from ``context.state["fedbus.model"]`` and writes the result to
``context.state["fedbus.result"]``, both as ArrayRecords.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from fedbus.contracts.run import RunPlan, Scalar
from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.flower import task_code
from fedbus.learning.flower.array_records import from_record, to_record
from fedbus.learning.flower.cohort import CohortPolicy
from fedbus.learning.flower.contribution import ContributionEvaluator, ContributionLimits
from fedbus.learning.flower.grid import BusGrid
from fedbus.learning.flower.legacy_strategy_hook import LegacyHook
from fedbus.learning.flower.private_api import SERVER_NODE_ID, set_process_identity
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.strategy_hook import StrategyHook
from fedbus.learning.flower.streaming_aggregation import streaming_aggregation
from fedbus.learning.library import NotEnoughClients, OnRound
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import Arrays, BadWeights

MODEL_KEY: Final = "fedbus.model"
RESULT_KEY: Final = "fedbus.result"
ROUNDS_KEY: Final = "num-server-rounds"


class ServerAppFailed(RuntimeError):
    """The task's ServerApp raised. The text is one line with the exception."""


class NoModelResult(ServerAppFailed):
    """The ServerApp ended without a final model."""

    def __init__(self, reference: str) -> None:
        super().__init__(
            f"the ServerApp {reference!r} ended without a final model. Train with `start` of a Flower strategy, "
            f"or assign the final ArrayRecord to context.state[{RESULT_KEY!r}]"
        )


@dataclass(frozen=True, kw_only=True)
class ServerJob:
    """The inputs of a ServerApp run."""

    path: Path
    """The task's directory."""
    serverapp: str
    plan: RunPlan
    model: Arrays
    run_config: dict[str, Scalar] = field(default_factory=dict)
    """The app's own run config; the plan's config overrides it."""
    first_round: int = 1
    """Greater than 1 if a lost run resumes; then *model* is the checkpoint of the round before."""
    streaming: bool = True
    selection: ClientSelection = field(default_factory=ClientSelection)
    contribution: ContributionLimits = field(default_factory=ContributionLimits)

    @property
    def rounds(self) -> int:
        """The number of rounds left."""
        return max(0, (self.plan.total_rounds or 3) - self.first_round + 1)


def run_server_app(grid: BusGrid, job: ServerJob, on_round: OnRound) -> Arrays:
    """Run the ServerApp of *job* to its end in this thread, and return the final model.

    *on_round* is called in this thread after each round, with its result and the global model.

    Raises:
        BadTask: the app cannot be loaded.
        ArchitectureMismatch: the stored model does not have the app's architecture.
        NotEnoughClients: the recruiting time ended before enough clients joined.
        GridClosed: the Grid was closed during the run.
        NoModelResult: the app ended without a final model.
        ServerAppFailed: the app raised.

    """
    app = task_code.load_server_app(job.path, job.serverapp)
    log = RoundLog(
        job.model, run=grid.run_name, first_round=job.first_round, tally=grid.tally, on_round=on_round
    )
    record = to_record(job.model)
    rounds = {"rounds": job.rounds, "first_round": job.first_round}
    cohort = CohortPolicy(grid.client_of, job.selection, ContributionEvaluator(job.contribution))
    strategy_hook = StrategyHook(job.model, record, log=log, cohort=cohort, **rounds)
    legacy_hook = LegacyHook(job.model, recruit_s=job.plan.recruit_s, log=log, **rounds)
    context = _make_context(grid, job, record)
    with ExitStack() as hooks:
        hooks.enter_context(strategy_hook.install())
        hooks.enter_context(legacy_hook.install())
        if job.streaming:
            hooks.enter_context(streaming_aggregation())
        _run_app(app, grid, context)
    if isinstance(result := context.state.get(RESULT_KEY), ArrayRecord):
        return from_record(result)
    if strategy_hook.was_used or legacy_hook.was_used:
        return log.latest
    raise NoModelResult(job.serverapp)


def _make_context(grid: BusGrid, job: ServerJob, record: ArrayRecord) -> Context:
    set_process_identity(grid.run.run_id)
    config = {**job.run_config, **job.plan.config}
    if ROUNDS_KEY in config:
        config[ROUNDS_KEY] = job.rounds
    state = RecordDict({MODEL_KEY: record})
    return Context(grid.run.run_id, SERVER_NODE_ID, node_config={}, state=state, run_config=config)


def _run_app(app: ServerApp, grid: BusGrid, context: Context) -> None:
    try:
        app(grid, context)
    except (BadWeights, NotEnoughClients, GridClosed):
        raise
    except (Exception, SystemExit) as error:
        raise ServerAppFailed(f"the ServerApp raised {task_code.format_error(error)}") from error
