"""`fedbus up`: bus, server side and clients on this machine."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.app.cli.agent_options import (
    AtMost,
    Dashboard,
    Every,
    Quorum,
    Rounds,
    RunConfig,
    StoreOrEmbedded,
    TaskSources,
)
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.cli.options import apply_schedule_options, check_unique_tasks
from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import EMBEDDED_STORE, run_stack
from fedbus.app.settings import Settings
from fedbus.app.terminal.startup_progress import StartupProgress, wait_until_serving

INSPECT_HINT = "next: fedbus clients ls · fedbus run start · fedbus run watch · fedbus events tail"
FOLLOW_HINT = "new commits are polled for; poll now: fedbus code look · rollout: fedbus code status"


def up(
    *,
    task: TaskSources = None,
    clients: Annotated[int, typer.Option(min=0, max=64, help="Number of clients on this machine.")] = 3,
    port: Annotated[int | None, typer.Option(help="Port of nats-server.", show_default="a free port")] = None,
    rounds: Rounds = None,
    quorum: Quorum = None,
    every: Every = None,
    at_most: AtMost = None,
    run_config: RunConfig = "",
    store: StoreOrEmbedded = "",
    public_models: Annotated[
        bool, typer.Option("--public-models", help="With --store s3: allow reading models without a key.")
    ] = False,
    dashboard: Dashboard = True,
) -> None:
    """Start NATS, the server side and clients on this machine; they run until Ctrl-C."""
    if public_models and store != EMBEDDED_STORE:
        raise CliError(
            "--public-models requires --store s3. For an S3 of your own: fedbus model access public --store s3://…",
            ExitCode.USAGE,
        )
    options = {
        "rounds": rounds,
        "quorum": quorum,
        "every": every,
        "at-most": at_most,
        "run-config": run_config,
    }
    server_options = [part for name, value in options.items() if value for part in (f"--{name}", str(value))]
    settings, console = Settings.from_environment(), Console()
    sources = [one if "://" in one else str(Path(one).absolute()) for one in task or [settings.task]]
    tasks = [load_initial_task(code_from_settings(settings, one), settings) for one in sources]
    names = [one.id for one in tasks]
    check_unique_tasks(names)
    for one in tasks:  # else each restart of the server process would log the error
        apply_schedule_options(one.table.schedule, every, at_most)

    async def work(stop: asyncio.Event) -> None:
        started = datetime.now(UTC)
        async with run_stack(
            settings,
            sources,
            clients=clients,
            port=port,
            server_options=server_options,
            store=store,
            public_models=public_models,
            dashboard=dashboard,
        ) as running:
            subject = f"task {names[0]} is" if len(names) == 1 else f"tasks {', '.join(names)} are"
            status = f"{subject} up on {running.nats.url} with {clients} clients"
            console.print(f"{status}; logs in {running.home}/logs", soft_wrap=True, highlight=False)
            console.print(f"models are in {running.store_url}", soft_wrap=True, highlight=False)
            if running.dashboard:
                console.print(f"the dashboard is on {running.dashboard}", soft_wrap=True, highlight=False)
            console.print(INSPECT_HINT, soft_wrap=True, highlight=False)
            if any("://" in one for one in sources):
                console.print(FOLLOW_HINT, soft_wrap=True, highlight=False)
            progress = StartupProgress(names, running.clients)
            serving = wait_until_serving(
                running.nats.url, settings.fed, progress, console, started_at=started
            )
            await wait_for_first(serving, stop.wait())
            await stop.wait()

    run_until_signal(work, "up", level="WARNING", log_format="console")
