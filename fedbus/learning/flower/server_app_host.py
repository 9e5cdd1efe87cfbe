"""Runs a task's ServerApp unmodified in this process, from the stored model to the final model.

An app with a Flower strategy needs no change: hooks inject the model and take the result. An app with its own
loop reads the model from ``context.state["fedbus.model"]`` and writes the result to
``context.state["fedbus.result"]``, both as ArrayRecords. MetricRecords that it leaves in ``context.state`` are the
metrics of the result.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from fedbus.contracts.task.aggregation import AggregationMode
from fedbus.learning.flower import task_code
from fedbus.learning.flower.array_records import from_record, to_record
from fedbus.learning.flower.cohort import CohortPolicy
from fedbus.learning.flower.contribution import ContributionEvaluator, ContributionLimits
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.legacy_strategy_hook import LegacyHook
from fedbus.learning.flower.library import ROUNDS_KEY
from fedbus.learning.flower.model_binding import ModelBinding, bind
from fedbus.learning.flower.private_api import SERVER_NODE_ID, set_process_identity
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.round_counter import RoundCounter
from fedbus.learning.flower.run_grid import RunGrid
from fedbus.learning.flower.strategy_hook import StrategyHook
from fedbus.learning.flower.strategy_modes import StrategyModes
from fedbus.learning.flower.streaming_aggregation import streaming_aggregation
from fedbus.learning.library import (
    Messenger,
    ModeUnsupported,
    NotEnoughClients,
    OnRound,
    ServerJob,
    TrainingFailed,
)
from fedbus.learning.round_log import RoundLog
from fedbus.learning.task_model import first_arrays
from fedbus.learning.weights import Arrays, BadWeights, architecture_digest

logger = structlog.get_logger("fedbus.learning")

MODEL_KEY: Final = "fedbus.model"
RESULT_KEY: Final = "fedbus.result"


class ServerAppFailed(TrainingFailed):
    """The task's ServerApp raised. The text is one line with the exception."""


class ServerAppHost:
    """The ServerApp of one run. Raises BadTask if it cannot be loaded."""

    def __init__(self, job: ServerJob) -> None:
        self._job = job
        _ = job.aggregation  # raises BadTask before clients join
        self._app = task_code.load_server_app(job.path, job.task.app["serverapp"])

    def run(self, messenger: Messenger, on_round: OnRound) -> Arrays | None:
        """Run the ServerApp to its end in this thread, and return the final model, if it has one."""
        return run_server_app(self._app, MessengerGrid(messenger), self._job, on_round)

    def close(self) -> None:
        """Do nothing: the app ends with the process."""


def run_server_app(app: ServerApp, grid: RunGrid, job: ServerJob, on_round: OnRound) -> Arrays | None:
    """Run *app* to its end in this thread, and return the final model; None if the app ended without one.

    *on_round* is called in this thread after each round, with its result and the global model.

    Raises:
        BadTask: the run's aggregation does not fit the task.
        ModeUnsupported: the app does not work in the run's aggregation mode.
        ArchitectureMismatch: the stored model does not have the app's architecture.
        NotEnoughClients: the recruiting time ended before enough clients joined.
        GridClosed: the Grid was closed during the run.
        ServerAppFailed: the app raised.
        NoUpdates: no client could train in any round.

    """
    table = job.task.table
    log = RoundLog(
        job.model,
        run=grid.run_name,
        first_round=job.first_round,
        tally=grid.tally,
        on_round=on_round,
        now=grid.now,
    )
    limits = ContributionLimits(**table.contribution.model_dump(by_alias=False))
    cohort = CohortPolicy(grid.client_of, job.selection, ContributionEvaluator(limits))
    rounds = RoundCounter.resume_at(job.first_round, planned=job.plan.rounds)
    streaming = job.aggregation.method == "streaming"
    strategy_hook = StrategyHook(
        partial(_bind_model, job),
        rounds=rounds,
        log=log,
        cohort=cohort,
        grid=grid,
        streaming=streaming,
        modes=_open_modes(job, grid, measures_contributions=cohort.contributions.is_enabled),
    )
    legacy_hook = LegacyHook(
        partial(_bind_model, job), rounds=rounds, recruit_s=job.plan.recruit_s, log=log, grid=grid
    )
    context = _make_context(grid, job)
    with ExitStack() as hooks:
        hooks.enter_context(strategy_hook.install())
        hooks.enter_context(legacy_hook.install())
        if streaming:
            hooks.enter_context(streaming_aggregation())
        _run_app(app, grid, context, job.path)
    has_reported = strategy_hook.was_used or legacy_hook.was_used
    if not has_reported:
        for number in range(grid.last_round + 1):
            log.add_outcome(grid.tally(number))
    log.check_updates()
    if isinstance(result := context.state.get(RESULT_KEY), ArrayRecord):
        binding = ModelBinding(job.model, is_fixed=table.architecture == "fixed")
        model = binding.to_model(from_record(result))
        if not has_reported:
            log.set_model(model)
            _report_own_loop(context, grid, log)
        return model
    if has_reported:
        return log.latest or None
    _report_own_loop(context, grid, log)
    logger.warning(
        "ServerApp ended without a model",
        run=grid.run_name,
        hint=f"train with `start` of a Flower strategy, or assign an ArrayRecord to context.state[{RESULT_KEY!r}]",
    )
    return None


def _open_modes(job: ServerJob, grid: RunGrid, *, measures_contributions: bool) -> StrategyModes | None:
    """Return the exchanges of the run's aggregation mode; None for ``sync``. Raises ModeUnsupported."""
    table = job.aggregation
    if table.mode is AggregationMode.SYNC:
        return None
    assert isinstance(grid, MessengerGrid), "flower-superlink refuses the mode when it opens the run"
    if measures_contributions and table.mode is not AggregationMode.DEADLINE:
        raise ModeUnsupported(
            f"contributions compare the updates of a round, and in the aggregation mode {table.mode} there are no "
            'rounds. Remove [tool.fedbus.contribution], or use mode = "sync" or "deadline"'
        )
    grid.training_refusal = (
        f"the aggregation mode {table.mode} needs a strategy of flwr.serverapp that derives from FedAvg, and its "
        'method `start`; this app sends its training messages itself. Use mode = "sync"'
    )
    return StrategyModes(grid, table)


def _report_own_loop(context: Context, grid: RunGrid, log: RoundLog) -> None:
    """Report the metrics that an app without a strategy has left as its last round, so that its version has them."""
    records = context.state.metric_records
    for record in records.values():
        log.add_metrics(record)
    if records:
        tally = grid.tally(grid.last_round)
        # A client that answered a query took part, without samples.
        answered = dict.fromkeys(tally.figures, 0)
        log.end_round(max(1, grid.last_round), replace(tally, participants=answered | tally.participants))


def _bind_model(job: ServerJob, app: Arrays) -> ModelBinding:
    is_fixed = job.task.table.architecture == "fixed"
    return bind(job.model, app, is_built=partial(_is_built, job), is_fixed=is_fixed)


def _is_built(job: ServerJob) -> bool:
    """Return whether the stored model has the architecture of the task's model builder. This builds a model."""
    if job.task.table.model is None:
        return False
    try:
        built = first_arrays(job.task) or {}
    except task_code.BadTask:
        return True  # it built the stored model once
    return architecture_digest(built) == architecture_digest(job.model)


def _make_context(grid: RunGrid, job: ServerJob) -> Context:
    set_process_identity(grid.run.run_id)
    config = job.config
    if job.plan.rounds and ROUNDS_KEY in config:
        config[ROUNDS_KEY] = job.plan.rounds
    state = RecordDict({MODEL_KEY: to_record(job.model)} if job.model else None)
    return Context(grid.run.run_id, SERVER_NODE_ID, node_config={}, state=state, run_config=config)


def _run_app(app: ServerApp, grid: RunGrid, context: Context, path: Path) -> None:
    try:
        app(grid, context)
    except (BadWeights, NotEnoughClients, ModeUnsupported, GridClosed):
        raise
    except (Exception, SystemExit) as error:
        raise ServerAppFailed(f"the ServerApp raised {task_code.describe_error(error, path)}") from error
