"""`fedbus up`: bus, server side and clients on this machine."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    Profile,
    ProfileSeed,
    Quorum,
    Rounds,
    RunConfig,
    StoreOrEmbedded,
    TaskSources,
)
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.cli.options import apply_schedule_options, check_unique_tasks, parse_run_config
from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import EMBEDDED_STORE, client_names, run_stack
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
    profile: Profile = "",
    profile_seed: ProfileSeed = None,
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
    client_options = _profile_options(profile, clients, profile_seed)
    for one in tasks:  # else each restart of the server process would log the error
        apply_schedule_options(one.table.schedule, every, at_most)
        parse_run_config(run_config, one)

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
            client_options=client_options,
        ) as running:
            subject = f"task {names[0]} is" if len(names) == 1 else f"tasks {', '.join(names)} are"
            status = f"{subject} up on {running.nats.url} with {clients} clients"
            console.print(f"{status}; logs in {running.home}/logs", soft_wrap=True, highlight=False)
            console.print(f"models are in {running.store_url}", soft_wrap=True, highlight=False)
            if running.dashboard:
                console.print(f"the dashboard is on {running.dashboard}", soft_wrap=True, highlight=False)
            if profile:
                console.print(_describe_groups(profile, client_options), soft_wrap=True, highlight=False)
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


def _profile_options(source: str, clients: int, seed: int | None) -> dict[str, Sequence[str]]:
    """Return the options of each client under a profile. Raises ProfileError."""
    if not source:
        if seed is not None:
            raise CliError("--profile-seed requires --profile", ExitCode.USAGE)
        return {}
    from fedbus.simulation.profiles.assignment import assign_groups  # noqa: PLC0415 - only with a profile
    from fedbus.simulation.profiles.reader import load_profile  # noqa: PLC0415 - only with a profile

    profile = load_profile(source)
    chosen_seed = profile.seed if seed is None else seed
    groups = assign_groups(profile, client_names(clients), chosen_seed)
    path = str(Path(source).absolute()) if "/" in source else source
    return {
        name: ("--profile", path, "--profile-group", group, "--profile-seed", str(chosen_seed))
        for name, group in groups.items()
    }


def _describe_groups(profile: str, client_options: Mapping[str, Sequence[str]]) -> str:
    members = defaultdict[str, list[str]](list)
    for client, options in client_options.items():
        members[options[3] or "no group"].append(client)
    return f"profile {profile}: " + "; ".join(f"{group}: {', '.join(of)}" for group, of in members.items())
