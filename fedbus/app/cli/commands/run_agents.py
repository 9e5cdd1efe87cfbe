"""What stays up: `fedbus demo`, `fedbus up`, `fedbus server up`, `fedbus client up` and `fedbus agent`."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbus.app.failures import CliError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedbus.app.composition.agents import AgentConfig, ClientConfig
    from fedbus.contracts.agent_names import AgentName

TaskSource = Annotated[
    str,
    typer.Option(
        "--task",
        help="The task, a Flower app: its directory, or git+https://host/repo@branch#subdirectory=dir, whose "
        "commits are followed.",
        show_default="FEDBUS_TASK, or the working directory",
    ),
]
TaskSources = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task, a Flower app: its directory, or git+https://host/repo@branch#subdirectory=dir, whose "
        "commits are followed. May be repeated.",
        show_default="FEDBUS_TASK, or the working directory",
    ),
]
Label = Annotated[
    list[str] | None, typer.Option(help="Device label as key=value, e.g. site=lab. Repeatable.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of each run. Overrides the task's.")]
Quorum = Annotated[
    int | None, typer.Option(min=1, help="Clients that a run waits for. Overrides the task's.")
]
Every = Annotated[
    str | None,
    typer.Option(
        help="Start a run automatically this long after the last one: 90s, 10m, 2h. Overrides the task's `every-s`."
    ),
]
AtMost = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of runs that the schedule starts. Overrides the task's."),
]
RunConfig = Annotated[str, typer.Option(help='The app\'s run configuration: "lr=0.1 local-epochs=1".')]
NodeConfig = Annotated[
    str, typer.Option(help='The device\'s configuration: "partition-id=0 num-partitions=3", or JSON.')
]
Store = Annotated[
    str,
    typer.Option(
        help="The model repository: a directory, or s3://bucket/prefix?endpoint=….",
        show_default="FEDBUS_STORE",
    ),
]
StoreOrEmbedded = Annotated[
    str,
    typer.Option(
        "--store",
        help="The model repository: a directory, s3://bucket/prefix?endpoint=…, or s3: start an S3 on this machine.",
    ),
]
Host = Annotated[str, typer.Option(help="Address of the inference server.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the inference server; 0: a free one.")]
Dashboard = Annotated[bool, typer.Option(help="Serve the dashboard too, to browsers on this machine.")]

INSPECT_HINT = "look with: fedbus clients ls · fedbus run start · fedbus run watch · fedbus events tail"
FOLLOW_HINT = "a new commit comes by itself, or at once: fedbus code look · how it goes: fedbus code status"

server = typer.Typer(no_args_is_help=True, help="The server side of a task.")
client = typer.Typer(no_args_is_help=True, help="One client, on this machine.")


def demo(
    *,
    clients: Annotated[int, typer.Option(min=1, max=64, help="How many clients.")] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="How many runs the scheduler starts.")] = 2,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each round.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where data sets are.", show_default="FEDBUS_DATA_DIR")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running at the end.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file, as JSON.")] = None,
    plot: Annotated[Path, typer.Option(help="Write the loss plot into this file.")] = Path("demo-loss.png"),
    task: Annotated[Path | None, typer.Option(help="Another task.", show_default="the MNIST example")] = None,
    store: StoreOrEmbedded = "",
    commit: Annotated[
        bool,
        typer.Option(
            "--commit",
            help="Change the task's code between two runs, by a signed commit to its Git repository.",
        ),
    ] = False,
    dashboard: Dashboard = True,
) -> None:
    """Show the whole life of a federated model on this machine, on real data."""
    from rich.console import Console

    from fedbus.app.demo.demo import DemoOptions
    from fedbus.app.demo.demo import run_demo as show
    from fedbus.app.demo.examples import mnist_path
    from fedbus.app.settings import Settings

    wishes = DemoOptions(
        task or mnist_path(), clients, rounds, runs, epochs, data, keep, json, plot, store, commit, dashboard
    )
    settings, console = Settings.from_environment(), Console()

    async def work(stop: asyncio.Event) -> None:
        report = await show(wishes, settings, stop, console)
        if stop.is_set() and len(report.fleet.ended) < runs:
            raise CliError("ended before its runs were over", ExitCode.INTERRUPTED)
        if not report.ok:
            raise CliError("the demo failed: see the tables above and the logs")

    _run_until_signal(work, "demo", level="ERROR")


def up(
    *,
    task: TaskSources = None,
    clients: Annotated[int, typer.Option(min=0, max=64, help="How many clients, on this machine.")] = 3,
    port: Annotated[
        int | None, typer.Option(help="The port of the nats-server.", show_default="one that is free")
    ] = None,
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
    """Bring up everything on this machine: bus, server and clients; it stays up until Ctrl-C."""
    from rich.console import Console

    from fedbus.agents.common.asyncio_tools import wait_for_first
    from fedbus.app.cli.options import apply_schedule_options
    from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
    from fedbus.app.local.stack import EMBEDDED_STORE, run_stack
    from fedbus.app.settings import Settings
    from fedbus.app.terminal.startup_progress import StartupProgress, wait_until_serving

    if public_models and store != EMBEDDED_STORE:
        raise CliError(
            "--public-models is for --store s3; in an S3 of your own: fedbus model access public --store s3://…",
            ExitCode.USAGE,
        )
    options = {
        "rounds": rounds,
        "quorum": quorum,
        "every": every,
        "at-most": at_most,
        "run-config": run_config,
    }
    given = [part for name, value in options.items() if value for part in (f"--{name}", str(value))]
    settings, console = Settings.from_environment(), Console()
    sources = [one if "://" in one else str(Path(one).absolute()) for one in task or [settings.task]]
    tasks = [load_initial_task(code_from_settings(settings, one), settings) for one in sources]
    names = [one.id for one in tasks]
    _check_unique(names)
    for one in tasks:  # told here: the server's process would say it into its log, again and again
        apply_schedule_options(one.table.schedule, every, at_most)

    async def work(stop: asyncio.Event) -> None:
        began = datetime.now(UTC)
        async with run_stack(
            settings,
            sources,
            clients=clients,
            port=port,
            server_options=given,
            store=store,
            public_models=public_models,
            dashboard=dashboard,
        ) as running:
            what = f"task {names[0]} is" if len(names) == 1 else f"tasks {', '.join(names)} are"
            up_now = f"{what} up on {running.nats.url} with {clients} clients"
            console.print(f"{up_now}; logs in {running.home}/logs", soft_wrap=True, highlight=False)
            console.print(f"models are in {running.store_url}", soft_wrap=True, highlight=False)
            if running.dashboard:
                console.print(f"the dashboard is on {running.dashboard}", soft_wrap=True, highlight=False)
            console.print(INSPECT_HINT, soft_wrap=True, highlight=False)
            if any("://" in one for one in sources):
                console.print(FOLLOW_HINT, soft_wrap=True, highlight=False)
            arrivals = StartupProgress(names, running.clients)
            here = wait_until_serving(running.nats.url, settings.fed, arrivals, console, began=began)
            await wait_for_first(here, stop.wait())
            await stop.wait()

    _run_until_signal(work, "up", level="WARNING")


@server.command("up")
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
    """Run the server's four agents in this process: manager, scheduler, Flower server wrapper, training monitor."""
    from fedbus.app.composition.agents import SERVER_AGENTS

    sites = [_agent_config(one, store, rounds, quorum, every, at_most, run_config) for one in task or [""]]
    _check_unique([site.task.id for site in sites])
    _run_agents(
        "server",
        {
            f"{name} {site.task.id}": partial(run, site)
            for site in sites
            for name, run in SERVER_AGENTS.items()
        },
    )


@client.command("up")
def client_up(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    task: TaskSources = None,
    node_config: NodeConfig = "",
    label: Label = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
) -> None:
    """Run a client's four agents in this process, for each of its tasks; ports count up with the tasks."""
    from fedbus.app.composition.agents import CLIENT_AGENTS, client_agent

    devices = [
        _client_config(id, one, node_config, label, host, port + number if port else 0)
        for number, one in enumerate(task or [""])
    ]
    _check_unique([device.site.task.id for device in devices])
    _run_agents(
        "client",
        {
            f"{name} {device.site.task.id}": client_agent(name, device)
            for device in devices
            for name in CLIENT_AGENTS
        },
        client=id,
    )


def agent(
    name: Annotated[
        str,
        typer.Argument(
            help="server-manager, workflow-scheduler, flower-server, client-manager, …; or several of one side, "
            "with commas."
        ),
    ],
    *,
    task: TaskSource = "",
    client: Annotated[str | None, typer.Option(help="The client's id, for an agent of a client.")] = None,
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
    """Run one agent in the foreground, or a few in one process."""
    from fedbus.app.composition.agents import SERVER_AGENTS, client_agent

    names = _parse_agents(name)
    if SERVER_AGENTS.keys() >= set(names):
        site = _agent_config(task, store, rounds, quorum, every, at_most, run_config)
        _run_agents(service_name(names), {name: partial(SERVER_AGENTS[name], site) for name in names})
    else:
        if client is None:
            raise CliError(f"{name} is a client agent: set the client with --client ID", ExitCode.USAGE)
        device = _client_config(client, task, node_config, label, host, port)
        _run_agents(service_name(names), {name: client_agent(name, device) for name in names}, client=client)


def _parse_agents(text: str) -> "list[AgentName]":
    """The agents that *text* names, all of one side; raises Failure."""
    from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS
    from fedbus.contracts.agent_names import AgentName

    names = list(dict.fromkeys(text.split(",")))
    known = [*SERVER_AGENTS, *CLIENT_AGENTS]
    for one in names:
        if one not in known:
            raise CliError(f"there is no agent {one!r}: choose one of {', '.join(known)}", ExitCode.USAGE)
    if not (SERVER_AGENTS.keys() >= set(names) or CLIENT_AGENTS.keys() >= set(names)):
        raise CliError(f"{text}: agents of the server and of a client do not go together", ExitCode.USAGE)
    return [AgentName(one) for one in names]


def service_name(names: "Sequence[str]") -> str:
    """The service that a process of these agents is, to whoever watches: of several it is that of their side."""
    from fedbus.app.composition.agents import SERVER_AGENTS

    if len(names) == 1:
        return names[0]
    return "server" if names[0] in SERVER_AGENTS else "client"


def _check_unique(tasks: list[str]) -> None:
    if len(set(tasks)) < len(tasks):
        raise CliError(f"each task can be given once: {', '.join(tasks)}", ExitCode.USAGE)


# --- what the options mean ---------------------------------------------------------------------


def _agent_config(
    task: str,
    store: str = "",
    rounds: int | None = None,
    quorum: int | None = None,
    every: str | None = None,
    at_most: int | None = None,
    run_config: str = "",
    client: str = "",
) -> "AgentConfig":
    from fedbus.app.cli.options import apply_schedule_options, parse_key_values, schedule_overrides
    from fedbus.app.composition.agents import AgentConfig
    from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
    from fedbus.app.settings import Settings
    from fedbus.contracts.run import RunOverrides

    settings = Settings.from_environment()
    code = code_from_settings(settings, task)
    read = load_initial_task(code, settings, client)
    apply_schedule_options(
        read.table.schedule, every, at_most
    )  # where the two do not go together it is told here
    where = store or settings.configured_store or ""
    return AgentConfig(
        settings.nats_url,
        settings.fed,
        settings.home,
        read,
        where,
        RunOverrides(rounds=rounds, quorum=quorum, config=parse_key_values(run_config)),
        schedule_overrides(every, at_most),
        code=code,
        signer=None if client else settings.signer(),
        trusted=settings.trusted() if client else None,
        trackers=() if client else settings.tracker_names,
        access=settings.access,
        job_template=settings.job_template if settings.launcher == "kubernetes" else "",
    )


def _client_config(
    id: str, task: str, node_config: str, label: list[str] | None, host: str, port: int
) -> "ClientConfig":
    from fedbus.app.cli.options import parse_node_config as device_config
    from fedbus.app.composition.agents import ClientConfig
    from fedbus.app.settings import Settings, parse_labels
    from fedbus.contracts.identifiers import client_id

    site = _agent_config(task, client=client_id(id))
    settings = Settings.from_environment()
    labels = parse_labels(" ".join(label)) if label else settings.labels
    return ClientConfig(
        site, client_id(id), device_config(node_config), labels, host, port, settings.train_at_once
    )


# --- running until told to stop -------------------------------------------------------------------


def _run_agents(
    name: str, agents: dict[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]], **about: str
) -> None:
    from fedbus.agents.common.child_process import exit_when_parent_dies
    from fedbus.app.composition.agents import run_together
    from fedbus.app.local.stack import is_supervised

    if is_supervised():  # by `fedbus up`: then our standard input is its life line
        exit_when_parent_dies()

    async def work(stop: asyncio.Event) -> None:
        await run_together(agents, stop)

    _run_until_signal(work, name, **about)


def _run_until_signal(
    work: Callable[[asyncio.Event], Any], name: str, *, level: str = "INFO", **about: str
) -> None:
    """Do *work* as the process *name*; *about* stands in all that it tells."""
    from fedbus.app import telemetry
    from fedbus.app.entrypoints.health import report_health
    from fedbus.app.entrypoints.signals import stop_on_signals
    from fedbus.app.settings import NATS_MONITOR
    from fedbus.app.telemetry.process_metrics import measure_process

    async def run() -> None:
        async with report_health():
            with stop_on_signals() as stop, measure_process(os.environ.get(NATS_MONITOR, "")):
                await work(stop)

    with telemetry.configure_telemetry(f"fedbus-{name}", level=level, **about):
        asyncio.run(run())
