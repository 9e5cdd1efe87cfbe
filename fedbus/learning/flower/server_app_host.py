"""Runs a task's ServerApp unmodified in this process, from the stored model to the final model.

An app with a Flower strategy needs no change: hooks inject the model and take the result. An app with its own
loop reads the model from ``context.state["fedbus.model"]`` and writes the result to
``context.state["fedbus.result"]``, both as ArrayRecords.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from fedbus.learning.flower import task_code
from fedbus.learning.flower.array_records import from_record, to_record
from fedbus.learning.flower.cohort import CohortPolicy
from fedbus.learning.flower.contribution import ContributionEvaluator, ContributionLimits
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.legacy_strategy_hook import LegacyHook
from fedbus.learning.flower.private_api import SERVER_NODE_ID, set_process_identity
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.run_grid import RunGrid
from fedbus.learning.flower.strategy_hook import StrategyHook
from fedbus.learning.flower.streaming_aggregation import streaming_aggregation
from fedbus.learning.library import Messenger, NotEnoughClients, OnRound, ServerJob, TrainingFailed
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import Arrays, BadWeights

MODEL_KEY: Final = "fedbus.model"
RESULT_KEY: Final = "fedbus.result"
ROUNDS_KEY: Final = "num-server-rounds"


class ServerAppFailed(TrainingFailed):
    """The task's ServerApp raised. The text is one line with the exception."""


class NoModelResult(ServerAppFailed):
    """The ServerApp ended without a final model."""

    def __init__(self, reference: str) -> None:
        super().__init__(
            f"the ServerApp {reference!r} ended without a final model. Train with `start` of a Flower strategy, "
            f"or assign the final ArrayRecord to context.state[{RESULT_KEY!r}]"
        )


class ServerAppHost:
    """The ServerApp of one run. Raises BadTask if it cannot be loaded."""

    def __init__(self, job: ServerJob) -> None:
        self._job = job
        self._app = task_code.load_server_app(job.path, job.task.app["serverapp"])

    def run(self, messenger: Messenger, on_round: OnRound) -> Arrays:
        """Run the ServerApp to its end in this thread, and return the final model."""
        return run_server_app(self._app, MessengerGrid(messenger), self._job, on_round)

    def close(self) -> None:
        """Do nothing: the app ends with the process."""


def run_server_app(app: ServerApp, grid: RunGrid, job: ServerJob, on_round: OnRound) -> Arrays:
    """Run *app* to its end in this thread, and return the final model.

    *on_round* is called in this thread after each round, with its result and the global model.

    Raises:
        ArchitectureMismatch: the stored model does not have the app's architecture.
        NotEnoughClients: the recruiting time ended before enough clients joined.
        GridClosed: the Grid was closed during the run.
        NoModelResult: the app ended without a final model.
        ServerAppFailed: the app raised.

    """
    log = RoundLog(
        job.model, run=grid.run_name, first_round=job.first_round, tally=grid.tally, on_round=on_round
    )
    record = to_record(job.model)
    limits = ContributionLimits(**job.task.table.contribution.model_dump(by_alias=False))
    rounds = {"rounds": rounds_left(job), "first_round": job.first_round}
    cohort = CohortPolicy(grid.client_of, job.selection, ContributionEvaluator(limits))
    strategy_hook = StrategyHook(job.model, record, log=log, cohort=cohort, **rounds)
    legacy_hook = LegacyHook(job.model, recruit_s=job.plan.recruit_s, log=log, **rounds)
    context = _make_context(grid, job, record)
    with ExitStack() as hooks:
        hooks.enter_context(strategy_hook.install())
        hooks.enter_context(legacy_hook.install())
        if job.task.table.aggregation.method == "streaming":
            hooks.enter_context(streaming_aggregation())
        _run_app(app, grid, context, job.path)
    if isinstance(result := context.state.get(RESULT_KEY), ArrayRecord):
        return from_record(result)
    if strategy_hook.was_used or legacy_hook.was_used:
        return log.latest
    raise NoModelResult(job.task.app["serverapp"])


def rounds_left(job: ServerJob) -> int:
    """Return the number of rounds that are left of the plan."""
    return max(0, (job.plan.total_rounds or 3) - job.first_round + 1)


def _make_context(grid: RunGrid, job: ServerJob, record: ArrayRecord) -> Context:
    set_process_identity(grid.run.run_id)
    config = job.config
    if ROUNDS_KEY in config:
        config[ROUNDS_KEY] = rounds_left(job)
    state = RecordDict({MODEL_KEY: record})
    return Context(grid.run.run_id, SERVER_NODE_ID, node_config={}, state=state, run_config=config)


def _run_app(app: ServerApp, grid: RunGrid, context: Context, path: Path) -> None:
    try:
        app(grid, context)
    except (BadWeights, NotEnoughClients, GridClosed):
        raise
    except (Exception, SystemExit) as error:
        raise ServerAppFailed(f"the ServerApp raised {task_code.describe_error(error, path)}") from error
