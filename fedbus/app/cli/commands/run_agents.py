"""`fedbus server up`, `fedbus client up` and `fedbus agent`: agents in the foreground."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from fedbus.agents.common.child_process import exit_when_parent_dies
from fedbus.app.cli.agent_options import (
    AtMost,
    Every,
    Host,
    Label,
    NodeConfig,
    Port,
    Profile,
    ProfileGroup,
    ProfileSeed,
    Quorum,
    Rounds,
    RunConfig,
    Store,
    TaskSource,
    TaskSources,
)
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.cli.options import (
    apply_schedule_options,
    check_unique_tasks,
    parse_node_config,
    parse_run_config,
    schedule_overrides,
)
from fedbus.app.composition.agents import (
    CLIENT_AGENTS,
    SERVER_AGENTS,
    AgentConfig,
    AgentFunction,
    ClientConfig,
    client_agent,
    run_together,
)
from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.stack import is_supervised, profile_start_time
from fedbus.app.settings import Settings, parse_labels
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.run import RunOverrides

if TYPE_CHECKING:
    from fedbus.app.composition.emulated_device import EmulatedDevice


def server_up(
    *,
    task: TaskSources = None,
    store: Store = "",
    rounds: Rounds = None,
    quorum: Quorum = None,
    every: Every = None,
    at_most: AtMost = None,
    run_config: RunConfig = "",
) -> None:
    """Run the four agents of the server side of each task in this process."""
    configs = [_agent_config(one, store, rounds, quorum, every, at_most, run_config) for one in task or [""]]
    check_unique_tasks([config.task.id for config in configs])
    _run_agents(
        "server",
        {
            f"{name} {config.task.id}": partial(run, config)
            for config in configs
            for name, run in SERVER_AGENTS.items()
        },
    )


def client_up(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    task: TaskSources = None,
    node_config: NodeConfig = "",
    label: Label = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
    profile: Profile = "",
    profile_group: ProfileGroup = None,
    profile_seed: ProfileSeed = None,
) -> None:
    """Run the four agents of a client in this process, for each of its tasks.

    With --port, the first task gets this port and each further task the next one.
    """
    if not profile and (profile_group is not None or profile_seed is not None):
        raise CliError("--profile-group and --profile-seed require --profile", ExitCode.USAGE)
    devices = [
        _client_config(id, one, node_config, label, host, port + number if port else 0)
        for number, one in enumerate(task or [""])
    ]
    check_unique_tasks([device.agent_config.task.id for device in devices])
    network: AbstractAsyncContextManager[None] = nullcontext()
    if profile:
        emulated = _emulate(devices[0], profile, profile_group, profile_seed)
        devices = [emulated.apply_to(device) for device in devices]
        network = emulated.run_proxy()
    _run_agents(
        "client",
        {
            f"{name} {device.agent_config.task.id}": client_agent(name, device)
            for device in devices
            for name in CLIENT_AGENTS
        },
        network,
        client=id,
    )


def agent(
    name: Annotated[
        str,
        typer.Argument(
            help="server-manager, workflow-scheduler, flower-server, client-manager, …; several agents of one side "
            "are separated by commas."
        ),
    ],
    *,
    task: TaskSource = "",
    client: Annotated[str | None, typer.Option(help="The client's id, for the agents of a client.")] = None,
    store: Store = "",
    rounds: Rounds = None,
    quorum: Quorum = None,
    every: Every = None,
    at_most: AtMost = None,
    run_config: RunConfig = "",
    node_config: NodeConfig = "",
    label: Label = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
) -> None:
    """Run one agent, or several agents of one side, in this process."""
    names = _parse_agents(name)
    if SERVER_AGENTS.keys() >= set(names):
        site = _agent_config(task, store, rounds, quorum, every, at_most, run_config)
        _run_agents(service_name(names), {name: partial(SERVER_AGENTS[name], site) for name in names})
    else:
        if client is None:
            raise CliError(f"{name} is a client agent. Name the client with --client ID", ExitCode.USAGE)
        device = _client_config(client, task, node_config, label, host, port)
        _run_agents(service_name(names), {name: client_agent(name, device) for name in names}, client=client)


def _parse_agents(text: str) -> list[AgentName]:
    """Parse agent names separated by commas.

    Raises:
        CliError: a name is unknown, or the agents are not all of one side.

    """
    names = list(dict.fromkeys(text.split(",")))
    agent_names = [*SERVER_AGENTS, *CLIENT_AGENTS]
    for one in names:
        if one not in agent_names:
            raise CliError(f"unknown agent {one!r}. Choose one of: {', '.join(agent_names)}", ExitCode.USAGE)
    if not (SERVER_AGENTS.keys() >= set(names) or CLIENT_AGENTS.keys() >= set(names)):
        raise CliError(
            f"{text}: agents of the server side and of a client cannot share a process", ExitCode.USAGE
        )
    return [AgentName(one) for one in names]


def service_name(names: Sequence[str]) -> str:
    """Return the service name in telemetry: the agent, or the side of several agents."""
    if len(names) == 1:
        return names[0]
    return "server" if names[0] in SERVER_AGENTS else "client"


def _agent_config(
    task: str,
    store: str = "",
    rounds: int | None = None,
    quorum: int | None = None,
    every: str | None = None,
    at_most: int | None = None,
    run_config: str = "",
    client: str = "",
) -> AgentConfig:
    settings = Settings.from_environment()
    code = code_from_settings(settings, task)
    initial_task = load_initial_task(code, settings, client)
    apply_schedule_options(initial_task.table.schedule, every, at_most)  # fail before the agents start
    store_url = store or settings.configured_store or ""
    return AgentConfig(
        settings.nats_url,
        settings.fed,
        settings.home,
        initial_task,
        store_url,
        RunOverrides(rounds=rounds, quorum=quorum, config=parse_run_config(run_config, initial_task)),
        schedule_overrides(every, at_most),
        code=code,
        signer=None if client else settings.load_signer(),
        trusted=settings.load_trusted_keys() if client else None,
        trackers=() if client else settings.tracker_names,
        access=settings.access,
        job_template=settings.job_template if settings.launcher == "kubernetes" else "",
    )


def _client_config(
    id: str, task: str, node_config: str, label: list[str] | None, host: str, port: int
) -> ClientConfig:
    site = _agent_config(task, client=client_id(id))
    settings = Settings.from_environment()
    labels = parse_labels(" ".join(label)) if label else settings.labels
    return ClientConfig(
        site, client_id(id), parse_node_config(node_config), labels, host, port, settings.train_at_once
    )


def _emulate(device: ClientConfig, source: str, group: str | None, seed: int | None) -> "EmulatedDevice":
    from fedbus.app.composition.emulated_device import emulate_device  # noqa: PLC0415 - only with a profile
    from fedbus.simulation.profiles.reader import load_profile  # noqa: PLC0415 - only with a profile

    return emulate_device(
        device.agent_config.nats_url,
        device.client,
        load_profile(source),
        group=group,
        seed=seed,
        started_at=profile_start_time(),
    )


def _run_agents(
    name: str,
    agents: dict[str, AgentFunction],
    network: AbstractAsyncContextManager[None] = nullcontext(),  # noqa: B008 - it has no state
    **about: str,
) -> None:
    if is_supervised():  # `fedbus up` holds the other end of standard input
        exit_when_parent_dies()

    async def work(stop: asyncio.Event) -> None:
        async with network:
            await run_together(agents, stop)

    run_until_signal(work, name, **about)
