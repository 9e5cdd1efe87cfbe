"""`fedbus demo`: the whole life of a model, on this machine, in the time of a coffee.

A bus, a server and clients in processes of their own; runs that the scheduler starts; each
client serving predictions all the while, keeping what it is asked, and training on it.
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
from fedbus.app.demo.live_view import DemoView, LiveView, PlainView
from fedbus.app.demo.prediction_load import PredictionCounts, PredictionLoad, Samples
from fedbus.app.demo.report import DemoReport, plot_runs
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import LocalStack, run_stack
from fedbus.app.settings import Settings
from fedbus.app.views.fleet import Fleet
from fedbus.bus.bus import Bus, Identity, StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.code import LookForCode
from fedbus.contracts.run import RunState
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.learning.flower import task_code
from fedbus.stores.captured.reader import count_rows

RUN_INTERVAL_S: Final = 2.0
"""Between two runs of the schedule."""
TIMEOUT_S: Final = 1800.0
SAMPLES_PER_CLIENT: Final = 500
"""Of each client's live samples: what its users ask about."""

MIN_ANSWERS_BY_NEWEST: Final = 10
"""Of each client, before the demonstration ends: a version is shown when it is used, not when it is there."""


@dataclass(frozen=True)
class DemoOptions:
    """What the user asked for."""

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
    """Whether the task's code changes between two runs, by a commit to its repository."""
    dashboard: bool = False
    """Whether it can be watched in a browser, too."""


async def run_demo(
    wishes: DemoOptions, settings: Settings, stop: asyncio.Event, console: Console
) -> DemoReport:
    """The demonstration; raises Failure where it cannot come to its end."""
    began = time.monotonic()
    data_dir = (wishes.data or settings.data_dir).absolute()
    task, theirs = _load_task(wishes), settings
    settings = settings.model_copy(
        update={
            "home": settings.home / "demo",
            "configured_nats_url": None,
            "configured_store": None,
            "configured_data_dir": data_dir,
        }
    )
    async with AsyncExitStack() as open_things:
        open_things.enter_context(
            _environment_variable("FEDBUS_DATA_DIR", data_dir)
        )  # read by the task's own code
        samples = await asyncio.to_thread(_load_samples, task, wishes.clients)
        dataset = await asyncio.to_thread(_dataset_name, task)
        console.print(
            f"fedbus demo: {wishes.clients} clients, {wishes.runs} runs of {task.table.rounds} rounds, {dataset}"
        )
        if task.id not in dataset.lower():
            console.print(f"no {task.id} data in {data_dir}: say where it is with --data", soft_wrap=True)
        settings = _remove_previous(settings)
        commits = await asyncio.to_thread(DemoCommits, settings.home, task) if wishes.commit else None
        if commits and commits.allowed_signers:
            signers = commits.allowed_signers
            open_things.enter_context(_environment_variable("FEDBUS_ALLOWED_SIGNERS", signers))
        running = await open_things.enter_async_context(
            run_stack(
                settings,
                [commits.source if commits else task.path],
                clients=wishes.clients,
                server_options=_server_options(wishes, task),
                store=wishes.store,
                dashboard=wishes.dashboard,
            )
        )
        if running.dashboard:
            console.print(f"the dashboard is on {running.dashboard}", soft_wrap=True, highlight=False)
        open_things.enter_context(theirs.announce_url(running.nats.url))
        bus = await open_things.enter_async_context(
            Bus.connect(running.nats.url, Identity(settings.fed, "demo"))
        )
        fleet = Fleet()
        traffic = PredictionLoad(lambda: _serving_endpoints(fleet), samples)
        view = LiveView(console) if console.is_terminal else PlainView(console)
        async with (
            _watch_fleet(bus, fleet, view, traffic.counts, running),
            traffic.flowing() as counts,
            _commit_between_runs(commits, bus, fleet, wishes, task),
        ):
            await _wait_until_done(wishes, fleet, counts, stop, running)
        report = DemoReport(dataset, fleet, counts, _count_captured(running, task), time.monotonic() - began)
        _write_report(report, wishes, console)
        if wishes.keep and not stop.is_set():
            console.print(f"still running on {running.nats.url}; Ctrl-C ends it")
            await stop.wait()
    return report


# --- before ---------------------------------------------------------------------------------


@contextmanager
def _environment_variable(name: str, value: Path) -> Iterator[None]:
    """*name* is *value* to this process and those it starts, and afterwards what it was before."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load_task(wishes: DemoOptions) -> Task:
    """The task, with what was asked for in the place of its own numbers."""
    from fedbus.stores.tasks.task_directory import read_task  # noqa: PLC0415 (runs git: not for --help)

    task = read_task(wishes.task)
    table = task.table.model_copy(
        update={"rounds": wishes.rounds or task.table.rounds, "quorum": wishes.clients}
    )
    return task.model_copy(update={"table": table})


def _server_options(wishes: DemoOptions, task: Task) -> list[str]:
    """What the demonstration has its server do otherwise than the task says."""
    options = ["--rounds", str(task.table.rounds), "--quorum", str(task.table.quorum)]
    scheduled = 1 if wishes.commit else wishes.runs  # each commit starts the next one
    options += ["--every", f"{RUN_INTERVAL_S:g}s", "--at-most", str(scheduled)]
    return options + (["--run-config", f"local-epochs={wishes.epochs}"] if wishes.epochs else [])


def _remove_previous(settings: Settings) -> Settings:
    """A demonstration begins at version 1: what the last one left is removed."""
    for name in ("nats", "models", "s3", "cache", "clients", "logs", "code", "task"):
        shutil.rmtree(settings.home / name, ignore_errors=True)
    for key in settings.home.glob("task-key*"):
        key.unlink()
    return settings


def _load_samples(task: Task, clients: int) -> dict[str, Samples]:
    """What the users of each client ask about: samples that are in nobody's training or test set."""
    if task.table.samples is None:
        raise CliError(
            f"task {task.id} names no samples in [tool.fedbus]: the demo has nothing to ask", ExitCode.USAGE
        )
    of = task_code.load_function(Path(task.path), task.table.samples)
    found = {f"c{number + 1}": of(number, clients) for number in range(clients)}
    return {
        client: (inputs[:SAMPLES_PER_CLIENT], labels[:SAMPLES_PER_CLIENT])
        for client, (inputs, labels) in found.items()
    }


def _dataset_name(task: Task) -> str:
    """Which data the task has found, where it can say."""
    assert task.table.samples is not None
    module = task.table.samples.partition(":")[0]
    try:
        return str(task_code.load_function(Path(task.path), f"{module}:dataset_name")())
    except task_code.BadTask:
        return task.id


# --- meanwhile ---------------------------------------------------------------------------------


@asynccontextmanager
async def _watch_fleet(
    bus: Bus, fleet: Fleet, view: DemoView, counts: PredictionCounts, running: LocalStack
) -> AsyncIterator[None]:
    """The fleet as it moves, shown as it does."""
    await bus.create_streams()
    wanted = [subjects.wildcard_for(bus.fed, Transition)]
    async with (
        bus.watch(lifecycle_stream(bus.fed), wanted, whole=True) as moves,
        asyncio.TaskGroup() as group,
    ):
        watching = group.create_task(_apply_transitions(moves, fleet, view), name="watch the fleet")
        with view.shown(fleet, counts, running):
            try:
                yield
            finally:
                watching.cancel()


async def _apply_transitions(moves: AsyncIterator[StoredMessage], fleet: Fleet, view: DemoView) -> None:
    async for seen in moves:
        if isinstance(seen.message, Transition):
            view.moved(fleet.see(seen.message, seen.envelope.time))


@asynccontextmanager
async def _commit_between_runs(
    commits: DemoCommits | None, bus: Bus, fleet: Fleet, wishes: DemoOptions, task: Task
) -> AsyncIterator[None]:
    """Between two runs, when every client serves what the first came to, a commit; the rest happens by itself."""
    if commits is None:
        yield
        return

    async def commit_between_runs() -> None:
        for run in range(1, wishes.runs):
            while not (len(fleet.ended) >= run and fleet.are_all_settled(wishes.clients)):
                await fleet.wait_for_change()
            await asyncio.to_thread(commits.change_something)
            # as a hook of the repository would: the server would find it by itself a little later
            await request_until_answered(bus, LookForCode(task=task.id), timeout_s=TIMEOUT_S)

    async with asyncio.TaskGroup() as group:
        committing = group.create_task(commit_between_runs(), name="commit between runs")
        try:
            yield
        finally:
            committing.cancel()


def _serving_endpoints(fleet: Fleet) -> Mapping[str, str]:
    """Where predictions are answered, as the inference agents say themselves."""
    return {name: view.endpoint for name, view in fleet.clients.items() if view.inference != "empty"}


async def _wait_until_done(
    wishes: DemoOptions, fleet: Fleet, counts: PredictionCounts, stop: asyncio.Event, running: LocalStack
) -> None:
    """Until all runs are over, and every client has answered its users with what came of them."""

    async def done() -> None:
        while not (
            len(fleet.ended) >= wishes.runs
            and (_has_failed_run(fleet) or fleet.are_all_settled(wishes.clients))
        ):
            await fleet.wait_for_change()
        while not (_has_failed_run(fleet) or _have_all_answered(fleet, counts)):
            await counts.another()

    try:
        async with asyncio.timeout(TIMEOUT_S):
            await wait_for_first(done(), stop.wait())
    except TimeoutError:
        raise CliError(f"the demo did not end within {TIMEOUT_S:g} s: see {running.home / 'logs'}") from None


def _have_all_answered(fleet: Fleet, counts: PredictionCounts) -> bool:
    """Whether each client has answered a few requests with the version that it serves now."""
    return all(
        view.served is not None and counts.by_client[name, view.served.version] >= MIN_ANSWERS_BY_NEWEST
        for name, view in fleet.clients.items()
    )


def _has_failed_run(fleet: Fleet) -> bool:
    return any(fleet.run_states[run.run] is not RunState.FINISHED for run in fleet.ended)


# --- after -----------------------------------------------------------------------------------------


def _count_captured(running: LocalStack, task: Task) -> int:
    databases = (running.home / "clients" / name / task.id / "captured.db" for name in running.clients)
    return sum(count_rows(database) for database in databases if database.exists())


def _write_report(report: DemoReport, wishes: DemoOptions, console: Console) -> None:
    report.print(console)
    for file in (wishes.plot_file, wishes.json_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if any(run.rounds for run in report.fleet.ended):
        plot_runs(report.fleet.ended, wishes.plot_file)
        console.print(f"plot: {wishes.plot_file}")
    if wishes.json_file is not None:
        wishes.json_file.write_text(json.dumps(report.as_json(), indent=2))
        console.print(f"facts: {wishes.json_file}")
