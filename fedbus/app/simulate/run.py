"""Runs a simulation for `fedbus simulate`: prepares it, shows and records its rounds, and publishes its model."""

import asyncio
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from fedbus.app.cli.commands.model.repository import store_address
from fedbus.app.failures import CliError, ExitCode, describe_error
from fedbus.app.settings import Settings
from fedbus.app.simulate.interruption import interruptible
from fedbus.app.simulate.options import SimulateOptions, make_origin, make_settings, warn_of_partition
from fedbus.app.simulate.preparation import PreparedSimulation, check_publishing, prepare, tracker_names
from fedbus.app.simulate.publishing import PublishedModel, SimulatedModel, publish
from fedbus.app.simulate.results_folder import SimulationConfig
from fedbus.app.simulate.summary import print_head, print_summary, resume_command, round_facts
from fedbus.app.simulate.tracing import SimulationTrace
from fedbus.app.simulate.tracking import SimulationTracking, open_tracking
from fedbus.app.telemetry import configure_telemetry
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, to_json
from fedbus.app.terminal.simulation_progress import SimulationView, render_round, show_line
from fedbus.contracts.run import RoundResult, RunState
from fedbus.learning.library import NoUpdates
from fedbus.learning.round_log import describe_failures
from fedbus.learning.weights import Arrays
from fedbus.simulation.observer import SimulationProgress, SimulationStart
from fedbus.simulation.settings import SimulationResult
from fedbus.simulation.simulator import simulate
from fedbus.stores.models.open import open_model_store


def run_simulate(options: SimulateOptions) -> None:
    """Simulate the task of *options*, and print its rounds and a summary.

    Raises:
        CliError: the options are invalid, or the simulation was interrupted.

    """
    settings = Settings.from_environment()
    with configure_telemetry("fedbus-simulation", level="WARNING", log_format="console"):
        prepared = prepare(options, settings)
        check_publishing(prepared)
        console = output.console()
        if not prepared.is_complete:
            _run_rounds(prepared, console)
        elif prepared.folder.record.state == "failed":
            raise _failed_before(prepared)
        published = _publish(prepared) if options.publish else None
        print_summary(prepared, published, console)


# --- rounds -----------------------------------------------------------------------------------


class _Observer:
    """Shows, stores and forwards what a simulation reports."""

    def __init__(
        self,
        prepared: PreparedSimulation,
        console: Console,
        view: SimulationView,
        tracking: SimulationTracking,
        trace: SimulationTrace,
    ) -> None:
        self._prepared = prepared
        self._console = console
        self._view = view
        self._tracking = tracking
        self._trace = trace
        self.last_model: Arrays | None = prepared.model
        self.unwritten: OSError | None = None
        """Why the results of a round could not be written. A library may report it as an error of the app."""

    def on_start(self, start: SimulationStart) -> None:
        self._trace.move_to(RunState.RUNNING)
        self._view.start(
            rounds=start.plan.total_rounds,
            done=start.first_round - 1,
            clients=start.clients,
            workers=start.workers,
        )

    def on_progress(self, progress: SimulationProgress) -> None:
        self._view.set_progress(
            progress.kind, done=progress.done, failed=progress.failed, total=progress.total
        )

    def on_round(self, result: RoundResult, model: Arrays) -> None:
        try:
            self._prepared.folder.add_round(result, model)
        except OSError as error:
            self.unwritten = error
            raise
        self._tracking.add_round(result)
        self._view.end_round(result)
        self.last_model = model
        if self._prepared.options.json:
            print(to_json(round_facts(result)), flush=True)
        else:
            self._console.print(
                render_round(result, at=datetime.now(UTC)), soft_wrap=not self._console.is_terminal
            )

    def on_warning(self, text: str) -> None:
        Console(stderr=True).print(Text(text, "yellow"), soft_wrap=True, highlight=False)


def _run_rounds(prepared: PreparedSimulation, console: Console) -> None:
    """Run the rounds that are left, and record the end. Raises CliError if they were interrupted."""
    options, folder, config = prepared.options, prepared.folder, prepared.config
    settings = make_settings(
        options,
        config,
        prepared.task,
        run=prepared.name,
        folder=folder.path,
        first_round=prepared.first_round,
        model=prepared.model,
    )
    view = SimulationView(prepared.name)
    trace = SimulationTrace(prepared.name, prepared.task.id, folder.record.trace_parent)
    folder.begin(config, trace_parent=trace.trace_parent)
    print_head(prepared, settings, console)
    started = time.monotonic()
    with ExitStack() as stack:
        tracking = stack.enter_context(
            open_tracking(
                tracker_names(options, prepared.settings), prepared.task.id, prepared.name, folder.path
            )
        )
        tracking.begin(
            _tracked_config(config), code_version=prepared.task.code_version, trace_id=trace.trace_id
        )
        observer = _Observer(prepared, console, view, tracking, trace)
        if warning := warn_of_partition(config, prepared.task):
            observer.on_warning(warning)

        def end(state: RunState, reason: str = "", result: SimulationResult | None = None) -> None:
            trace.move_to(state, reason)
            tracking.end(state, reason)
            try:
                folder.end(
                    state,
                    model=result.model if result else None,
                    seconds=time.monotonic() - started,
                    simulated_s=result.simulated_s if result else 0.0,
                    peak_memory_bytes=result.peak_memory_bytes if result else 0,
                    reason=reason,
                )
            except OSError as error:
                raise _unwritable(prepared, error) from None

        with interruptible() as interruption:
            try:
                with show_line(view.render, console, wanted=not options.json):
                    result = simulate(settings, observer)
                _check_resumed(prepared)
            except KeyboardInterrupt:
                end(RunState.CANCELLED, "interrupted")
                raise _interrupted(prepared, interruption.exit_code) from None
            except Exception as error:
                if observer.unwritten is not None:
                    failure = _unwritable(prepared, observer.unwritten)
                    end(RunState.FAILED, str(failure))
                    raise failure from error
                end(RunState.FAILED, describe_error(error)[0])
                raise
            end(RunState.FINISHED, result=result)


def _check_resumed(prepared: PreparedSimulation) -> None:
    """Check that a round of a resumed simulation has an update, in an earlier part or in this one. Raises NoUpdates."""
    rounds = prepared.folder.read_rounds()
    failures = {client: reason for one in reversed(rounds) for client, reason in one.failures.items()}
    if prepared.first_round > 1 and failures and not any(one.participants for one in rounds):
        raise NoUpdates(f"no client could train in any round: {describe_failures(failures)}")


def _failed_before(prepared: PreparedSimulation) -> CliError:
    return CliError(
        f"{prepared.name} has failed and has no more rounds: {prepared.folder.record.reason}. "
        f"Continue it with a larger --rounds, or start a new simulation without --resume"
    )


def _interrupted(prepared: PreparedSimulation, code: ExitCode) -> CliError:
    done = max((result.round for result in prepared.folder.read_rounds()), default=0)
    return CliError(
        f"{prepared.name} was interrupted after {pluralize(done, 'round')}. To continue: "
        + resume_command(prepared),
        code,
    )


def _unwritable(prepared: PreparedSimulation, error: OSError) -> CliError:
    return CliError(
        f"cannot write the results in {prepared.folder.path}: {error.strerror or error}. "
        f"Free space or change the permissions, then continue with {resume_command(prepared)}",
        ExitCode.MACHINE,
    )


# --- the end ----------------------------------------------------------------------------------


def _publish(prepared: PreparedSimulation) -> PublishedModel:
    folder, options, settings = prepared.folder, prepared.options, prepared.settings
    if not folder.model_path.exists():
        raise CliError(f"{prepared.name} ended without a model, so there is nothing to publish")
    address = store_address(options.store)
    is_local = bool(settings.configured_nats_url or settings.local_nats_url)
    models = open_model_store(address, prepared.task.id)
    uses_same_store = models.url == open_model_store(settings.store_url, prepared.task.id).url
    model = SimulatedModel(
        file=folder.model_path,
        simulation=prepared.name,
        rounds=folder.read_rounds(),
        config=dict(prepared.config.overrides),
        origin=make_origin(prepared.config, options.engine),
        parent=prepared.start.manifest if prepared.start else None,
    )
    return asyncio.run(
        publish(model, prepared.task, models, settings, ask_server=is_local and uses_same_store)
    )


def _tracked_config(config: SimulationConfig) -> dict[str, Any]:
    """Return the configuration for trackers: the app's values, and those of the simulation with a prefix."""
    about = config.model_dump(exclude={"task", "code_version", "overrides"}, exclude_none=True)
    return {**config.overrides, **{f"simulation.{name}": value for name, value in about.items()}}
