"""`fedbus demo`: the whole life of a federated model on this machine."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedbus.app.cli.agent_options import Dashboard, StoreOrEmbedded
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.demo.demo import DemoOptions, run_demo
from fedbus.app.demo.examples import mnist_path
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings


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
    wishes = DemoOptions(
        task or mnist_path(), clients, rounds, runs, epochs, data, keep, json, plot, store, commit, dashboard
    )
    settings, console = Settings.from_environment(), Console()

    async def work(stop: asyncio.Event) -> None:
        report = await run_demo(wishes, settings, stop, console)
        if stop.is_set() and len(report.finished_runs) < runs:
            raise CliError("ended before its runs were over", ExitCode.INTERRUPTED)
        if not report.ok:
            raise CliError("the demo failed: see the tables above and the logs")

    run_until_signal(work, "demo", level="ERROR")
