"""`fedbus demo`: the whole life of a model on this machine, in a few minutes.

The demo starts a nats-server, a server side and clients in processes of their own. The scheduler starts runs. Each
client serves predictions all the time, captures their inputs and trains on them.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from fedbus.agents.common.asyncio_tools import request_until_answered, wait_for_first
from fedbus.app.demo.commits import DemoCommits
from fedbus.app.demo.live_view import DemoDisplay, LiveDisplay, PlainDisplay
from fedbus.app.demo.prediction_load import PredictionCounts, PredictionLoad, Samples
from fedbus.app.demo.report import DemoReport, plot_runs
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import LocalStack, run_stack
from fedbus.app.settings import Settings
from fedbus.app.terminal.startup_progress import FirstModelNotBuilt
from fedbus.app.views.federation_status import apply_stored
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import InferenceState
from fedbus.contracts.code import LookForCode
from fedbus.contracts.run import RunState
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import FederationView
from fedbus.learning import task_code
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.captured.reader import count_rows
from fedbus.stores.tasks.task_directory import read_task

RUN_INTERVAL_S: Final = 2.0
"""Between two runs of the schedule."""
TIMEOUT_S: Final = 1800.0
MAX_TRANSITIONS: Final = 20_000
"""The transitions that the report can show."""
SAMPLES_PER_CLIENT: Final = 500
"""The live samples that the users of a client send."""

MIN_ANSWERS_BY_NEWEST: Final = 10
"""The predictions that each client answers with the last version before the demo ends."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `fedbus demo`."""

    task: Path
    clients: int = 3
    rounds: int | None = None
    runs: int = 2
    epochs: int | None = None
    data: Path | None = None
    keep: bool = False
    json_file: Path | None = None
    plot_file: Path = Path("demo-loss.png")
    store: str = ""
    commit: bool = False
    """Whether a commit to the task's repository changes the code between two runs."""
    dashboard: bool = False


async def run_demo(
    options: DemoOptions, settings: Settings, stop: asyncio.Event, console: Console
) -> DemoReport:
    """Run the demo.

    Raises:
        CliError: The task has no samples, or the demo does not end in time.

    """
    started_at = time.monotonic()
    data_dir = (options.data or settings.data_dir).absolute()
    task, user_settings = _load_task(options), settings
    settings = settings.model_copy(
        update={
            "home": settings.home / "demo",
            "configured_nats_url": None,
            "configured_store": None,
            "configured_data_dir": data_dir,
        }
    )
    async with AsyncExitStack() as stack:
        stack.enter_context(_environment_variable("FEDBUS_DATA_DIR", data_dir))  # read by the task's own code
        samples = await asyncio.to_thread(_load_samples, task, options.clients)
        dataset = await asyncio.to_thread(_dataset_name, task)
        rounds = task.plan_run().total_rounds
        length = f" of {rounds} rounds" if rounds else ""
        console.print(f"fedbus demo: {options.clients} clients, {options.runs} runs{length}, {dataset}")
        if task.id not in dataset.lower():
            console.print(f"no {task.id} data in {data_dir}; name its directory with --data", soft_wrap=True)
        settings = _remove_previous(settings)
        commits = await asyncio.to_thread(DemoCommits, settings.home, task) if options.commit else None
        if commits and commits.allowed_signers:
            signers = commits.allowed_signers
            stack.enter_context(_environment_variable("FEDBUS_ALLOWED_SIGNERS", signers))
        running = await stack.enter_async_context(
            run_stack(
                settings,
                [commits.source if commits else task.path],
                clients=options.clients,
                server_options=_server_options(options, task),
                store=options.store,
                dashboard=options.dashboard,
            )
        )
        if running.dashboard:
            console.print(f"the dashboard is on {running.dashboard}", soft_wrap=True, highlight=False)
        stack.enter_context(user_settings.announce_url(running.nats.url))
        bus = await stack.enter_async_context(Bus.connect(running.nats.url, Identity(settings.fed, "demo")))
        federation = _DemoFederation(task.id, options.clients)
        load = PredictionLoad(federation.serving_endpoints, samples)
        display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
        async with (
            _follow_federation(bus, federation, display, load.counts),
            load.running() as counts,
            _commit_between_runs(commits, bus, federation, options, task),
        ):
            await _wait_until_done(options, federation, counts, stop, running)
        seconds = time.monotonic() - started_at
        report = DemoReport(dataset, federation.view, counts, _count_captured(running, task), seconds)
        _write_report(report, options, console)
        if options.keep and not stop.is_set():
            console.print(f"still running on {running.nats.url}; stop it with Ctrl-C")
            await stop.wait()
    return report


# --- before ---------------------------------------------------------------------------------


@contextmanager
def _environment_variable(name: str, value: Path) -> Iterator[None]:
    """Set an environment variable of this process and its children while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load_task(options: DemoOptions) -> Task:
    """Read the task and apply the options to it."""
    task = read_task(options.task, open_library)
    table = task.table.model_copy(
        update={"rounds": options.rounds or task.table.rounds, "quorum": options.clients}
    )
    return task.model_copy(update={"table": table})


def _server_options(options: DemoOptions, task: Task) -> list[str]:
    """Return the options of the server process that differ from the task."""
    arguments = ["--quorum", str(task.table.quorum)]
    if task.table.rounds is not None:
        arguments += ["--rounds", str(task.table.rounds)]
    scheduled = 1 if options.commit else options.runs  # each commit starts the next run
    arguments += ["--every", f"{RUN_INTERVAL_S:g}s", "--at-most", str(scheduled)]
    return arguments + (["--run-config", f"local-epochs={options.epochs}"] if options.epochs else [])


def _remove_previous(settings: Settings) -> Settings:
    """Remove the files of the previous demo, so that this one starts at version 1."""
    for name in ("nats", "models", "s3", "cache", "clients", "logs", "code", "task"):
        shutil.rmtree(settings.home / name, ignore_errors=True)
    for key in settings.home.glob("task-key*"):
        key.unlink()
    return settings


def _load_samples(task: Task, clients: int) -> dict[str, Samples]:
    """Load the samples that the users of each client send; they are in no training or test set."""
    if task.table.samples is None:
        raise CliError(
            f"the demo needs samples to predict: task {task.id} has no `samples` in [tool.fedbus]",
            ExitCode.USAGE,
        )
    load_samples = task_code.load_function(Path(task.path), task.table.samples)
    by_client = {f"c{number + 1}": load_samples(number, clients) for number in range(clients)}
    return {
        client: (inputs[:SAMPLES_PER_CLIENT], labels[:SAMPLES_PER_CLIENT])
        for client, (inputs, labels) in by_client.items()
    }


def _dataset_name(task: Task) -> str:
    """Return the name of the data set that the task uses; its id if the task does not name one."""
    module = (task.table.samples or "").partition(":")[0]
    try:
        return str(task_code.load_function(Path(task.path), f"{module}:dataset_name")())
    except task_code.BadTask:
        return task.id


# --- meanwhile ---------------------------------------------------------------------------------


class _DemoFederation:
    """The state of the demo's federation, and a way to wait for its next change."""

    def __init__(self, task: str, clients: int) -> None:
        self.view = FederationView(max_history=MAX_TRANSITIONS)
        self.task = task
        self._clients = clients
        self._changed = asyncio.Event()

    def apply(self, stored: StoredMessage) -> bool:
        self._changed.set()
        return apply_stored(self.view, stored)

    async def wait_for_change(self) -> None:
        """Wait for the next transition."""
        self._changed.clear()
        await self._changed.wait()

    @property
    def is_settled(self) -> bool:
        """Whether every client serves the champion."""
        return self.view.do_all_serve_champion(self.task, self._clients)

    @property
    def has_failed_run(self) -> bool:
        return any(run.state != RunState.FINISHED for run in self.view.finished_runs)

    def serving_endpoints(self) -> Mapping[str, str]:
        """Return the endpoint of each client that serves a model."""
        return {
            client.client: client.endpoint
            for client in self.view.clients.values()
            if client.inference_state not in ("", InferenceState.EMPTY)
        }

    def has_every_client_answered(self, counts: PredictionCounts) -> bool:
        """Return whether each client has answered enough requests with the version that it serves now, if it serves."""
        return all(
            client.not_served != ""
            or (
                client.served_model is not None
                and counts.by_client[client.client, client.served_model.version] >= MIN_ANSWERS_BY_NEWEST
            )
            for client in self.view.clients.values()
        )


@asynccontextmanager
async def _follow_federation(
    bus: Bus, federation: _DemoFederation, display: DemoDisplay, counts: PredictionCounts
) -> AsyncIterator[None]:
    """Apply all transitions to *federation* and show them while the block runs."""
    await bus.create_streams()
    wanted = [subjects.wildcard_for(bus.fed, Transition)]
    async with (
        bus.read_stream(lifecycle_stream(bus.fed), wanted, whole=True) as stream,
        asyncio.TaskGroup() as group,
    ):
        follower = group.create_task(
            _apply_transitions(stream, federation, display), name="follow the federation"
        )
        with display.show(federation.view, federation.task, counts):
            try:
                yield
            finally:
                follower.cancel()


async def _apply_transitions(
    stream: AsyncIterator[StoredMessage], federation: _DemoFederation, display: DemoDisplay
) -> None:
    async for stored in stream:
        if federation.apply(stored):
            display.on_transition(federation.view.history[-1])


@asynccontextmanager
async def _commit_between_runs(
    commits: DemoCommits | None, bus: Bus, federation: _DemoFederation, options: DemoOptions, task: Task
) -> AsyncIterator[None]:
    """Commit a change after each run but the last, when every client serves the model of that run.

    The rollout and the next run follow from the commit.
    """
    if commits is None:
        yield
        return

    async def commit_between_runs() -> None:
        for run in range(1, options.runs):
            while not (len(federation.view.finished_runs) >= run and federation.is_settled):
                await federation.wait_for_change()
            await asyncio.to_thread(commits.commit_change)
            # a repository's hook sends the same request; without it the server polls a little later
            await request_until_answered(bus, LookForCode(task=task.id), timeout_s=TIMEOUT_S)

    async with asyncio.TaskGroup() as group:
        committing = group.create_task(commit_between_runs(), name="commit between runs")
        try:
            yield
        finally:
            committing.cancel()


async def _wait_until_done(
    options: DemoOptions,
    federation: _DemoFederation,
    counts: PredictionCounts,
    stop: asyncio.Event,
    running: LocalStack,
) -> None:
    """Wait until all runs have finished and every client has answered users with the last model, or until *stop*.

    Raises:
        FirstModelNotBuilt: The task's code does not make a first model.

    """

    async def done() -> None:
        while not (
            len(federation.view.finished_runs) >= options.runs
            and (federation.has_failed_run or federation.is_settled)
        ):
            await federation.wait_for_change()
            if failure := federation.view.first_model_failure(federation.task):
                raise FirstModelNotBuilt(federation.task, failure)
        while not (federation.has_failed_run or federation.has_every_client_answered(counts)):
            await counts.wait_for_answer()

    try:
        async with asyncio.timeout(TIMEOUT_S):
            await wait_for_first(done(), stop.wait())
    except TimeoutError:
        raise CliError(f"the demo did not end within {TIMEOUT_S:g} s: see {running.home / 'logs'}") from None


# --- after -----------------------------------------------------------------------------------------


def _count_captured(running: LocalStack, task: Task) -> int:
    databases = (running.home / "clients" / name / task.id / "captured.db" for name in running.clients)
    return sum(count_rows(database) for database in databases if database.exists())


def _write_report(report: DemoReport, options: DemoOptions, console: Console) -> None:
    report.print(console)
    for file in (options.plot_file, options.json_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    runs = [run.data for run in report.finished_runs]
    if any(run.rounds for run in runs):
        plot_runs(runs, options.plot_file)
        console.print(f"plot: {options.plot_file}")
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report.as_json(), indent=2))
        console.print(f"results: {options.json_file}")
