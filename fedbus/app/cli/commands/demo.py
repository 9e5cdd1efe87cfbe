"""`fedbus demo`: the lifecycle of a federated model on this machine."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedbus.app.cli.agent_options import Dashboard, StoreOrEmbedded
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.demo.demo import DemoOptions, run_demo
from fedbus.app.demo.examples import mnist_path_for
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.contracts.task.task import DEFAULT_LIBRARY


def demo(
    *,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Number of clients.")] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Number of runs.")] = 2,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each round.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory of the data sets.", show_default="FEDBUS_DATA_DIR")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep everything running after the last run.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file, as JSON.")] = None,
    plot: Annotated[Path, typer.Option(help="Write the loss plot to this file.")] = Path("demo-loss.png"),
    task: Annotated[
        Path | None, typer.Option(help="Directory of another task.", show_default="the MNIST example")
    ] = None,
    library: Annotated[
        str, typer.Option(help="The training library of the MNIST example; not with --task.")
    ] = DEFAULT_LIBRARY,
    store: StoreOrEmbedded = "",
    commit: Annotated[
        bool,
        typer.Option(
            "--commit",
            help="Change the task's code between two runs with a signed commit to its Git repository.",
        ),
    ] = False,
    dashboard: Dashboard = True,
) -> None:
    """Train, serve and retrain a federated model on this machine, with real data."""
    settings, console = Settings.from_environment(), Console()
    path = task or mnist_path_for(library, settings.home / "demo" / "example")
    options = DemoOptions(
        path, clients, rounds, runs, epochs, data, keep, json, plot, store, commit, dashboard
    )

    async def work(stop: asyncio.Event) -> None:
        report = await run_demo(options, settings, stop, console)
        if stop.is_set() and len(report.finished_runs) < runs:
            raise CliError("the demo was stopped before its last run ended", ExitCode.INTERRUPTED)
        if not report.is_ok:
            raise CliError("the demo failed. See the tables above and the logs")

    run_until_signal(work, "demo", level="ERROR", log_format="console")
