"""What stays up: `fedbus demo`, `fedbus up`, `fedbus server up`, `fedbus client up` and `fedbus agent`."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbus.app.failures import Exit, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedbus.app.composition.agents import Device, Site
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
    list[str] | None, typer.Option(help="What the device is told apart by: site=lab. May be repeated.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of each run, instead of the task's.")]
Quorum = Annotated[
    int | None, typer.Option(min=1, help="Clients that a run waits for, instead of the task's.")
]
Every = Annotated[
    str | None,
    typer.Option(
        help="Start runs by themselves, so long after the last: 90s, 10m, 2h. Instead of the task's `every-s`."
    ),
]
AtMost = Annotated[
    int | None, typer.Option(min=1, help="How many runs the schedule starts in all, instead of the task's.")
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
StoreHere = Annotated[
    str,
    typer.Option(
        "--store",
        help="The model repository: a directory, s3://bucket/prefix?endpoint=…, or s3: one that is started here.",
    ),
]
Host = Annotated[str, typer.Option(help="Where predictions are served.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")]
Dashboard = Annotated[bool, typer.Option(help="Serve the dashboard too, to browsers on this machine.")]

LOOK_WITH = "look with: fedbus clients ls · fedbus run start · fedbus run watch · fedbus events tail"
FOLLOWED = "a new commit comes by itself, or at once: fedbus code look · how it goes: fedbus code status"

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
    json: Annotated[Path | None, typer.Option(help="Write what it came to into this file, as JSON.")] = None,
    plot: Annotated[Path, typer.Option(help="Write the loss plot into this file.")] = Path("demo-loss.png"),
    task: Annotated[Path | None, typer.Option(help="Another task.", show_default="the MNIST example")] = None,
    store: StoreHere = "",
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

    from fedbus.app.demo.demo import Wishes
    from fedbus.app.demo.demo import demo as show
    from fedbus.app.demo.examples import mnist
    from fedbus.app.settings import Settings

    wishes = Wishes(
        task or mnist(), clients, rounds, runs, epochs, data, keep, json, plot, store, commit, dashboard
    )
    settings, console = Settings.from_environment(), Console()

    async def work(stop: asyncio.Event) -> None:
        report = await show(wishes, settings, stop, console)
        if stop.is_set() and len(report.fleet.ended) < runs:
            raise Failure("ended before its runs were over", Exit.INTERRUPTED)
        if not report.ok:
            raise Failure("the demo did not come to a good end: see the tables above and the logs")

    _until_told(work, "demo", level="ERROR")


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
    store: StoreHere = "",
    public_models: Annotated[
        bool, typer.Option("--public-models", help="With --store s3: anybody who reaches it may read models.")
    ] = False,
    dashboard: Dashboard = True,
) -> None:
    """Bring up everything on this machine: bus, server and clients; it stays up until Ctrl-C."""
    from rich.console import Console

    from fedbus.agents.common.asyncio_tools import first_of
    from fedbus.app.cli.options import schedule
    from fedbus.app.composition.initial_code import code_of, first_task
    from fedbus.app.local.stack import EMBEDDED, stack
    from fedbus.app.settings import Settings
    from fedbus.app.terminal.startup_progress import Arrivals, until_all_serve

    if public_models and store != EMBEDDED:
        raise Failure(
            "--public-models is for --store s3; in an S3 of your own: fedbus model access public --store s3://…",
            Exit.USAGE,
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
    tasks = [first_task(code_of(settings, one), settings) for one in sources]
    names = [one.id for one in tasks]
    _assert_different(names)
    for one in tasks:  # told here: the server's process would say it into its log, again and again
        schedule(one.table.schedule, every, at_most)

    async def work(stop: asyncio.Event) -> None:
        began = datetime.now(UTC)
        async with stack(
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
            console.print(LOOK_WITH, soft_wrap=True, highlight=False)
            if any("://" in one for one in sources):
                console.print(FOLLOWED, soft_wrap=True, highlight=False)
            arrivals = Arrivals(names, running.clients)
            here = until_all_serve(running.nats.url, settings.fed, arrivals, console, began=began)
            await first_of(here, stop.wait())
            await stop.wait()

    _until_told(work, "up", level="WARNING")


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

    sites = [_site(one, store, rounds, quorum, every, at_most, run_config) for one in task or [""]]
    _assert_different([site.task.id for site in sites])
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
    from fedbus.app.composition.agents import CLIENT_AGENTS, on_device

    devices = [
        _device(id, one, node_config, label, host, port + number if port else 0)
        for number, one in enumerate(task or [""])
    ]
    _assert_different([device.site.task.id for device in devices])
    _run_agents(
        "client",
        {
            f"{name} {device.site.task.id}": on_device(name, device)
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
    from fedbus.app.composition.agents import SERVER_AGENTS, on_device

    names = _agents_in(name)
    if SERVER_AGENTS.keys() >= set(names):
        site = _site(task, store, rounds, quorum, every, at_most, run_config)
        _run_agents(service_of(names), {name: partial(SERVER_AGENTS[name], site) for name in names})
    else:
        if client is None:
            raise Failure(f"{name} belongs to a client: say which with --client ID", Exit.USAGE)
        device = _device(client, task, node_config, label, host, port)
        _run_agents(service_of(names), {name: on_device(name, device) for name in names}, client=client)


def _agents_in(text: str) -> "list[AgentName]":
    """The agents that *text* names, all of one side; raises Failure."""
    from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS
    from fedbus.contracts.agent_names import AgentName

    names = list(dict.fromkeys(text.split(",")))
    known = [*SERVER_AGENTS, *CLIENT_AGENTS]
    for one in names:
        if one not in known:
            raise Failure(f"there is no agent {one!r}: choose one of {', '.join(known)}", Exit.USAGE)
    if not (SERVER_AGENTS.keys() >= set(names) or CLIENT_AGENTS.keys() >= set(names)):
        raise Failure(f"{text}: agents of the server and of a client do not go together", Exit.USAGE)
    return [AgentName(one) for one in names]


def service_of(names: "Sequence[str]") -> str:
    """The service that a process of these agents is, to whoever watches: of several it is that of their side."""
    from fedbus.app.composition.agents import SERVER_AGENTS

    if len(names) == 1:
        return names[0]
    return "server" if names[0] in SERVER_AGENTS else "client"


def _assert_different(tasks: list[str]) -> None:
    if len(set(tasks)) < len(tasks):
        raise Failure(f"each task can be given once: {', '.join(tasks)}", Exit.USAGE)


# --- what the options mean ---------------------------------------------------------------------


def _site(
    task: str,
    store: str = "",
    rounds: int | None = None,
    quorum: int | None = None,
    every: str | None = None,
    at_most: int | None = None,
    run_config: str = "",
    client: str = "",
) -> "Site":
    from fedbus.app.cli.options import key_values, schedule, schedule_overrides
    from fedbus.app.composition.agents import Site
    from fedbus.app.composition.initial_code import code_of, first_task
    from fedbus.app.settings import Settings
    from fedbus.contracts.run import RunOverrides

    settings = Settings.from_environment()
    code = code_of(settings, task)
    read = first_task(code, settings, client)
    schedule(read.table.schedule, every, at_most)  # where the two do not go together it is told here
    where = store or settings.given_store or ""
    return Site(
        settings.nats_url,
        settings.fed,
        settings.home,
        read,
        where,
        RunOverrides(rounds=rounds, quorum=quorum, config=key_values(run_config)),
        schedule_overrides(every, at_most),
        code=code,
        signer=None if client else settings.signer(),
        trusted=settings.trusted() if client else None,
        trackers=() if client else settings.tracker_names,
        access=settings.access,
        job_template=settings.job_template if settings.launcher == "kubernetes" else "",
    )


def _device(id: str, task: str, node_config: str, label: list[str] | None, host: str, port: int) -> "Device":
    from fedbus.app.cli.options import node_config as device_config
    from fedbus.app.composition.agents import Device
    from fedbus.app.settings import Settings, labels_in
    from fedbus.contracts.identifiers import client_id

    site = _site(task, client=client_id(id))
    settings = Settings.from_environment()
    labels = labels_in(" ".join(label)) if label else settings.labels
    return Device(site, client_id(id), device_config(node_config), labels, host, port, settings.train_at_once)


# --- running until told to stop -------------------------------------------------------------------


def _run_agents(
    name: str, agents: dict[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]], **about: str
) -> None:
    from fedbus.agents.common.child_process import parent_watch
    from fedbus.app.composition.agents import run_together
    from fedbus.app.local.stack import is_kept

    if is_kept():  # by `fedbus up`: then our standard input is its life line
        parent_watch()

    async def work(stop: asyncio.Event) -> None:
        await run_together(agents, stop)

    _until_told(work, name, **about)


def _until_told(
    work: Callable[[asyncio.Event], Any], name: str, *, level: str = "INFO", **about: str
) -> None:
    """Do *work* as the process *name*; *about* stands in all that it tells."""
    from fedbus.app import telemetry
    from fedbus.app.entrypoints.health import pulse
    from fedbus.app.entrypoints.signals import stopping
    from fedbus.app.settings import NATS_MONITOR
    from fedbus.app.telemetry.process_metrics import measure_process

    async def run() -> None:
        async with pulse():
            with stopping() as stop, measure_process(os.environ.get(NATS_MONITOR, "")):
                await work(stop)

    with telemetry.configured(f"fedbus-{name}", level=level, **about):
        asyncio.run(run())
