"""Runs a simulation for `fedbus simulate`: prepares it, shows and records its rounds, and publishes its model."""

import asyncio
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from fedbus import __version__
from fedbus.app.cli.commands.model.repository import find_manifest, open_models, store_address
from fedbus.app.failures import CliError, ExitCode, describe_error
from fedbus.app.settings import Settings
from fedbus.app.simulate.interruption import interruptible
from fedbus.app.simulate.options import (
    SimulateOptions,
    StartModel,
    load_task,
    make_config,
    make_origin,
    make_settings,
    resume_config,
)
from fedbus.app.simulate.publishing import PublishedModel, SimulatedModel, publish
from fedbus.app.simulate.results_folder import (
    ResultsFolder,
    SimulationConfig,
    SimulationRecord,
    latest_results_path,
    new_results_path,
)
from fedbus.app.simulate.tracing import SimulationTrace
from fedbus.app.simulate.tracking import SimulationTracking, open_tracking
from fedbus.app.telemetry import configure_telemetry
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json, to_json
from fedbus.app.terminal.simulation_progress import SimulationView, render_round, show_line
from fedbus.app.terminal.trace_waterfall import format_duration
from fedbus.contracts.identifiers import check_id
from fedbus.contracts.run import RoundResult, RunState
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.weights import Arrays
from fedbus.simulation.observer import SimulationProgress, SimulationStart
from fedbus.simulation.settings import SimulationResult, SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.models.open import open_model_store
from fedbus.stores.trackers.interface import load_tracker

BUILT_IN: Final = "local"
"""The tracker that always records."""
_UPDATE_FIELDS: Final = {"mode", "updates", "staleness", "late_merged", "late_dropped"}
"""The fields of a round whose aggregation mode is not ``sync``."""


@dataclass
class _Prepared:
    """A simulation that can start."""

    options: SimulateOptions
    settings: Settings
    task: Task
    folder: ResultsFolder
    config: SimulationConfig
    first_round: int
    model: Arrays | None
    start: StartModel | None

    @property
    def name(self) -> str:
        return self.folder.record.simulation

    @property
    def is_complete(self) -> bool:
        """Whether all rounds are done, in an earlier part of a resumed simulation."""
        return bool(self.config.rounds) and self.first_round > self.config.rounds


def run_simulate(options: SimulateOptions) -> None:
    """Simulate the task of *options*, and print its rounds and a summary.

    Raises:
        CliError: the options are invalid, or the simulation was interrupted.

    """
    settings = Settings.from_environment()
    with configure_telemetry("fedbus-simulation", level="WARNING", log_format="console"):
        prepared = _prepare(options, settings)
        _check_publishing(prepared)
        console = output.console()
        if not prepared.is_complete:
            _run_rounds(prepared, console)
        published = _publish(prepared) if options.publish else None
        _report(prepared, published, console)


# --- preparation ------------------------------------------------------------------------------


def _prepare(options: SimulateOptions, settings: Settings) -> _Prepared:
    task = load_task(options.task, settings)
    if options.resume:
        path = options.out or latest_results_path(settings.home, task.id)
        if path is None:
            raise CliError(
                f"there is no simulation of {task.id} in {settings.home / 'simulations'} to resume",
                ExitCode.NOT_FOUND,
            )
        folder = ResultsFolder.open(path)
        options = replace(
            options,
            profile=options.profile or folder.record.profile,
            trackers=options.trackers or folder.record.trackers,
        )
        config = resume_config(options, task, settings, folder)
        done, model = folder.read_checkpoint()
        start = _load_start(options, settings, task, str(config.start_version or ""))
        first = model or (start.arrays if start else None)
        return _Prepared(options, settings, task, folder, config, done + 1, first, start)
    start = _load_start(options, settings, task, options.start_version)
    config = make_config(options, task, settings, start)
    path = options.out or new_results_path(settings.home, task.id)
    record = SimulationRecord(
        simulation=check_id("simulation", path.resolve().name),
        config=config,
        profile=_absolute(options.profile),
        trackers=tuple(_tracker_names(options, settings)),
        fedbus=__version__,
        started=datetime.now(UTC),
    )
    arrays = start.arrays if start else None
    for name in _tracker_names(options, settings):
        load_tracker(name)
    make_settings(options, config, task, run=record.simulation, folder=path, first_round=1, model=arrays)
    folder = ResultsFolder.create(path, record)
    return _Prepared(options, settings, task, folder, config, 1, arrays, start)


def _load_start(options: SimulateOptions, settings: Settings, task: Task, version: str) -> StartModel | None:
    """Load the version of the model repository to start from, if there is one."""
    if not version:
        return None
    del settings

    async def load() -> StartModel:
        models = open_models(store_address(options.store), task.id)
        manifest = await find_manifest(models, version)
        return StartModel(manifest, weights.load(await models.local_path(manifest.sha256)))

    return asyncio.run(load())


def _absolute(profile: str | None) -> str | None:
    """Return *profile* as an absolute path if it is a file, so that a resumed simulation finds it."""
    return str(Path(profile).absolute()) if profile is not None and Path(profile).is_file() else profile


def _tracker_names(options: SimulateOptions, settings: Settings) -> list[str]:
    """Return the trackers of the options; those of the settings if there are none. The built-in one is not named."""
    return [name for name in dict.fromkeys(options.trackers or settings.tracker_names) if name != BUILT_IN]


def _check_publishing(prepared: _Prepared) -> None:
    """Check before the first round that the repository can be used, and the signing key be read."""
    if prepared.options.publish:
        prepared.settings.load_signer()
        models = open_models(store_address(prepared.options.store), prepared.task.id)
        asyncio.run(models.prepare())


# --- rounds -----------------------------------------------------------------------------------


class _Observer:
    """Shows, stores and forwards what a simulation reports."""

    def __init__(
        self,
        prepared: _Prepared,
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
        self._prepared.folder.add_round(result, model)
        self._tracking.add_round(result)
        self._view.end_round(result)
        self.last_model = model
        if self._prepared.options.json:
            print(to_json(_round_facts(result)), flush=True)
        else:
            self._console.print(
                render_round(result, at=datetime.now(UTC)), soft_wrap=not self._console.is_terminal
            )

    def on_warning(self, text: str) -> None:
        _print_line(Console(stderr=True), Text(text, "yellow"))


def _run_rounds(prepared: _Prepared, console: Console) -> None:
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
    _print_head(prepared, settings, console)
    started = time.monotonic()
    with ExitStack() as stack:
        tracking = stack.enter_context(
            open_tracking(
                _tracker_names(options, prepared.settings), prepared.task.id, prepared.name, folder.path
            )
        )
        tracking.begin(
            _tracked_config(config), code_version=prepared.task.code_version, trace_id=trace.trace_id
        )
        observer = _Observer(prepared, console, view, tracking, trace)

        def end(state: RunState, reason: str = "", result: SimulationResult | None = None) -> None:
            folder.end(
                state,
                model=result.model if result else None,
                seconds=time.monotonic() - started,
                simulated_s=result.simulated_s if result else 0.0,
                peak_memory_bytes=result.peak_memory_bytes if result else 0,
                reason=reason,
            )
            trace.move_to(state, reason)
            tracking.end(state, reason)

        with interruptible():
            try:
                with show_line(view.render, console, wanted=not options.json):
                    result = simulate(settings, observer)
            except KeyboardInterrupt:
                end(RunState.CANCELLED, "interrupted")
                raise _interrupted(prepared) from None
            except Exception as error:
                end(RunState.FAILED, describe_error(error)[0])
                raise
            end(RunState.FINISHED, result=result)


def _interrupted(prepared: _Prepared) -> CliError:
    done = max((result.round for result in prepared.folder.read_rounds()), default=0)
    return CliError(
        f"{prepared.name} was interrupted after {pluralize(done, 'round')}. To continue: "
        + _resume_command(prepared),
        ExitCode.INTERRUPTED,
    )


def _resume_command(prepared: _Prepared) -> str:
    task, out = shlex.quote(prepared.options.task), shlex.quote(_short_path(prepared.folder.path))
    return f"fedbus simulate {task} --out {out} --resume"


# --- the end ----------------------------------------------------------------------------------


def _publish(prepared: _Prepared) -> PublishedModel:
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


def _report(prepared: _Prepared, published: PublishedModel | None, console: Console) -> None:
    """Print the summary."""
    rounds = prepared.folder.read_rounds()
    facts = _summary(prepared, rounds, published)
    if prepared.options.json:
        print_json(facts)
        return
    last = rounds[-1] if rounds else None
    trained = sum(len(one.participants) for one in rounds)
    figures = [f"loss {last.loss:.4f}" if last and last.loss is not None else ""]
    figures += [f"accuracy {last.accuracy:.2%}" if last and last.accuracy is not None else ""]
    count = pluralize(sum(one.round > 0 for one in rounds), "round")
    head = f"{prepared.name} finished: {count} in {format_duration(facts['seconds'])}"
    console.print(Text("  ".join(filter(None, [head, *figures])), "bold"), soft_wrap=True)
    rows = [("trained", f"{trained} client updates, {facts['clients_per_s']:.1f} a second")]
    if prepared.config.profile:
        rows.append(("virtual time", format_duration(facts["simulated_s"])))
    if facts["peak_memory_bytes"]:
        rows.append(
            ("peak memory", f"{output.format_size(facts['peak_memory_bytes'])}, all processes together")
        )
    rows.append(("results", _short_path(prepared.folder.path)))
    if published:
        standing = "the champion" if published.is_champion else "not the champion"
        rows.append(("published", f"version {published.manifest.version}, {standing}: {published.reason}"))
    rows.append(("next", _next_commands(prepared, published)))
    for name, text in rows:
        line = Text.assemble((f"  {name:<12} ", "dim"), text)
        console.print(line, soft_wrap=True, highlight=False)


def _next_commands(prepared: _Prepared, published: PublishedModel | None) -> str:
    commands = [f"fedbus trace {prepared.name}"]
    if published:
        commands.append(f"fedbus model show {published.manifest.version}")
        commands.append(f"fedbus up --task {shlex.quote(prepared.options.task)}")
    else:
        commands.append(f"{_resume_command(prepared)} --publish")
    return " · ".join(commands)


def _summary(
    prepared: _Prepared, rounds: list[RoundResult], published: PublishedModel | None
) -> dict[str, Any]:
    record, last = prepared.folder.record, rounds[-1] if rounds else None
    seconds = record.seconds if record.config.profile else sum(one.seconds for one in rounds)
    trained = sum(len(one.participants) for one in rounds)
    return {
        "simulation": record.simulation,
        "state": record.state,
        "rounds": sum(one.round > 0 for one in rounds),
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "seconds": record.seconds,
        "simulated_s": record.simulated_s,
        "clients_per_s": trained / seconds if seconds else 0.0,
        "peak_memory_bytes": record.peak_memory_bytes,
        "results": str(prepared.folder.path.absolute()),
        "model_sha256": record.model_sha256,
        "trace_id": record.trace_parent.split("-")[1] if record.trace_parent else "",
        "published": published.facts if published else None,
    }


def _round_facts(result: RoundResult) -> dict[str, Any]:
    return {
        "round": result.round,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "metrics": result.metrics,
        "seconds": result.seconds,
        "clients": len(result.participants),
        "samples": sum(result.participants.values()),
        "failures": result.failures,
        **(result.model_dump(include=_UPDATE_FIELDS) if result.mode else {}),
    }


def _tracked_config(config: SimulationConfig) -> dict[str, Any]:
    """Return the configuration for trackers: the app's values, and those of the simulation with a prefix."""
    about = config.model_dump(exclude={"task", "code_version", "overrides"}, exclude_none=True)
    return {**config.overrides, **{f"simulation.{name}": value for name, value in about.items()}}


def _print_head(prepared: _Prepared, settings: SimulationSettings, console: Console) -> None:
    if prepared.options.json:
        return
    config = prepared.config
    parts = [
        pluralize(config.clients, "client"),
        f"cohort {config.cohort}" if config.cohort else "",
        f"rounds {prepared.first_round} to {config.rounds}"
        if config.rounds and prepared.first_round > 1
        else pluralize(config.rounds, "round")
        if config.rounds
        else "",
        f"partition {config.partition}" if config.partition else "",
        *(f"{name} {value}" for name, value in config.aggregation.items()),
        f"profile {prepared.options.profile}" if prepared.options.profile else "",
        pluralize(settings.worker_count, "worker"),
        f"{len(settings.gpus)} GPUs" if settings.gpus else "",
        f"seed {config.seed}",
        "deterministic" if config.deterministic else "",
    ]
    line = f"{prepared.name}: {', '.join(filter(None, parts))}"
    console.print(Text(line), soft_wrap=True)


def _print_line(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _short_path(path: Path) -> str:
    """Return *path* relative to the working directory if it is inside of it."""
    absolute = path.absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
