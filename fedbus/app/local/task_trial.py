"""A trial of a task on this machine: its code is imported, its model is built, and a run of one round has two clients.

Everything is in a scratch directory that is deleted afterwards: nats-server's files, the models, the logs, and what the
task's code writes to its working directory. That directory has links to the files of the task, so that code finds its
files by relative names.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.code_check import CheckFailed, check
from fedbus.agents.common.process_orders import CheckProcessConfig
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import LocalStack, run_stack
from fedbus.app.settings import Settings
from fedbus.app.terminal.plain import pluralize
from fedbus.app.terminal.startup_progress import FirstModelNotBuilt, StartupProgress
from fedbus.app.views.federation_status import follow_view
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.contracts.client import ClientState
from fedbus.contracts.run import RUN, RunData, RunState, StartRun
from fedbus.contracts.task.task import Task
from fedbus.domain.federation_view import EntityState, FederationView

AGENT: Final = "validate"
CLIENTS: Final = 2
SETTLE_S: Final = 60.0
"""How long the clients may take to load the model of the run."""

ReportStep = Callable[[str], None]
"""Shows a step that has succeeded."""


class TrialFailed(CliError):
    """A step of the trial failed. The text is the reason."""


@dataclass(frozen=True)
class _Trial:
    task: Task
    settings: Settings
    """With the scratch directory as FEDBUS_HOME."""
    report: ReportStep
    limit_s: float


@contextmanager
def scratch_environment(task: Path, scratch: Path) -> Iterator[None]:
    """Make *scratch* FEDBUS_HOME and the parent of the working directory while the block runs.

    The task's files stay as they are: Python writes no bytecode next to them.
    """
    work = scratch / "work"
    work.mkdir()
    for entry in task.resolve().iterdir():
        if not entry.name.startswith("."):
            (work / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    changes = {"FEDBUS_HOME": str(scratch / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    removed = ("FEDBUS_NATS_URL", "FEDBUS_STORE", "FEDBUS_TASK", "FEDBUS_CREDS", "FEDBUS_CA")
    before = {name: os.environ.pop(name) for name in (*changes, *removed) if name in os.environ}
    os.environ.update(changes)
    try:
        with contextlib.chdir(work):
            yield
    finally:
        for name in changes:
            os.environ.pop(name, None)
        os.environ.update(before)


async def try_task(
    task: Task, settings: Settings, stop: asyncio.Event, report: ReportStep, *, limit_s: float
) -> None:
    """Try *task* in the FEDBUS_HOME of *settings*, and *report* each step.

    Raises:
        TrialFailed: A step failed, or did not end within *limit_s*.

    """
    trial = _Trial(task, settings, report, limit_s)
    await _check_code(trial)
    if task.table.eligibility.rule is not None:
        report("no run is tried: the task has an eligibility rule, which a scratch device may not satisfy")
        return
    running: LocalStack | None = None
    failure: TrialFailed | None = None
    try:
        async with (
            asyncio.timeout(limit_s),
            run_stack(
                settings,
                [task.path],
                clients=CLIENTS,
                server_options=("--rounds", "1", "--quorum", str(CLIENTS)),
            ) as running,
            Bus.connect(running.nats.url, Identity(settings.fed, AGENT)) as bus,
        ):
            await bus.create_streams()
            try:
                await wait_for_first(_try_run(trial, bus), stop.wait())
            except TrialFailed as error:  # the task group of the stack would wrap it
                failure = error
    except TimeoutError:
        restarts = "; ".join(
            f"{name} ended: {why}" for name, why in (running.restarts if running else {}).items()
        )
        raise TrialFailed(
            f"the trial did not end in time (limit {limit_s:g} s{f'; {restarts}' if restarts else ''}). "
            "To raise the limit: --limit-s"
        ) from None
    if failure is not None:
        raise failure
    if stop.is_set():
        raise TrialFailed("the trial was stopped", ExitCode.INTERRUPTED)


async def _check_code(trial: _Trial) -> None:
    """Import the code of both sides, build the model, and run the task's own check."""
    config = CheckProcessConfig(
        nats_url="", federation=trial.settings.federation, task=trial.task, server_side=True
    )
    logs = trial.settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        checked = await check(config, log_file=logs / "check.log")
    except CheckFailed as error:
        raise TrialFailed(str(error)) from None
    built = (
        "its model is built" if checked.architecture else "it has no model of its own before its first run"
    )
    trial.report(f"the code is imported, and {built}")


class _ViewChanges:
    """A view of the federation, and a way to wait for its next change."""

    def __init__(self) -> None:
        self.view = FederationView()
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def wait_until(self, is_met: Callable[[], bool]) -> None:
        while not is_met():
            self._changed.clear()
            await self._changed.wait()


async def _try_run(trial: _Trial, bus: Bus) -> None:
    started_at, changes = datetime.now(UTC), _ViewChanges()
    view = changes.view
    names = [f"c{number}" for number in range(1, CLIENTS + 1)]
    progress = StartupProgress([trial.task.id], names, view)
    async with follow_view(bus, view, changes.notify):

        def has_started() -> bool:
            progress.check(started_at)
            for client in view.clients.values():
                if client.state == ClientState.TERMINATED and client.manager is not None:
                    raise TrialFailed(f"client {client.client} did not start: {client.manager.reason}")
            return progress.is_complete

        try:
            await changes.wait_until(has_started)
        except FirstModelNotBuilt as error:
            raise TrialFailed(str(error)) from None
        with contextlib.suppress(
            RequestRefused, NoResponse
        ):  # the task's own schedule may have started a run
            await bus.request(
                StartRun(task=trial.task.id, rounds=1, quorum=CLIENTS, trigger=AGENT), timeout_s=30
            )
        await changes.wait_until(lambda: view.latest_run is not None and view.latest_run.state in RUN.final)
        assert view.latest_run is not None
        _check_run(view.latest_run)
        trial.report(_describe_run(view.latest_run))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await changes.wait_until(lambda: view.do_all_serve_champion(trial.task.id, CLIENTS))
        _report_serving(trial, view)


def _check_run(run: EntityState[RunData]) -> None:
    """Raise TrialFailed if the run failed, or one of its clients did."""
    failures = [f"client {client}: {why}" for one in run.data.rounds for client, why in one.failures.items()]
    if run.state != RunState.FINISHED:
        reasons = "; ".join(dict.fromkeys((run.reason, *failures)))
        raise TrialFailed(f"the run of one round {run.state}: {reasons}")
    if failures:
        raise TrialFailed(f"a client failed in the run of one round: {'; '.join(dict.fromkeys(failures))}")


def _describe_run(run: EntityState[RunData]) -> str:
    last = run.data.rounds[-1] if run.data.rounds else None
    rounds = pluralize(sum(one.round > 0 for one in run.data.rounds), "round")
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in (last.metrics if last else {}).items())
    return f"a run of {rounds} with {CLIENTS} clients finished{f': {metrics}' if metrics else ''}"


def _report_serving(trial: _Trial, view: FederationView) -> None:
    clients = list(view.clients.values())
    reason = next((one.not_served for one in clients if one.not_served), "")
    if reason:
        trial.report(f"no predictions yet: {reason}")
    elif clients and all(one.served_model is not None for one in clients):
        trial.report("both clients serve predictions")
    else:
        refusals = [
            f"{one.client}: {one.manager.reason}" for one in clients if one.manager and one.manager.reason
        ]
        raise TrialFailed(
            f"the clients do not serve predictions: {'; '.join(refusals) or 'no reason is known'}"
        )
