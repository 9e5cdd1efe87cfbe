"""`fedbus simulate`: run a task on virtual clients on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedbus.app.cli.options import AggregationOption, ModeOption, parse_aggregation, parse_override
from fedbus.app.simulate.options import SimulateOptions
from fedbus.app.simulate.run import run_simulate
from fedbus.app.terminal import output


def simulate(
    task: Annotated[
        str, typer.Argument(help="The task: a directory, or git+https://host/repo@branch#subdirectory=dir.")
    ] = ".",
    *,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of virtual clients.", show_default="10")
    ] = None,
    cohort: Annotated[
        int | None,
        typer.Option(min=1, help="Clients that train in each round.", show_default="the strategy's sampling"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds.", show_default="the task's")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="How the data are divided: iid, dirichlet:0.3, classes:2, sizes:linear, classes:2+sizes:linear.",
            show_default="the app's own",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of cohorts, partitions and the app's random numbers.", show_default="0"
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a value of the run configuration: lr=0.1. Repeatable."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of worker processes.", show_default="one for each core")
    ] = None,
    mode: ModeOption = None,
    aggregation: AggregationOption = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="The same bits for any number of workers, and on a fleet; slower."
        ),
    ] = False,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs that the workers share.")] = 0,
    profile: Annotated[
        Path | None,
        typer.Option(help="Delays, speeds and absences of the clients: a YAML file or a built-in profile."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets.", show_default="FEDBUS_DATA_DIR")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where workers run: on this machine, or in a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster.", show_default="a new one on this machine")
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help="Experiment tracker: tensorboard, mlflow or wandb. Repeatable.",
            show_default="FEDBUS_TRACKERS",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="FEDBUS_HOME/simulations/TASK-sim-N"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the simulation in --out, or the task's last one."),
    ] = False,
    start_version: Annotated[
        str,
        typer.Option(
            "--from",
            help="Start from a version of the model repository: champion, latest or 3.",
            show_default="the task's first model",
        ),
    ] = "",
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish the model as a version of the model repository.")
    ] = False,
    store: Annotated[
        str,
        typer.Option(
            help="The model repository: a directory, or s3://bucket/prefix.", show_default="FEDBUS_STORE"
        ),
    ] = "",
    json: output.JsonOption = False,
) -> None:
    """Simulate a task with virtual clients on this machine: the same app as on a fleet."""
    run_simulate(
        SimulateOptions(
            task=task,
            clients=clients,
            cohort=cohort,
            rounds=rounds,
            seed=seed,
            deterministic=deterministic or None,
            partition=partition,
            profile=profile,
            overrides=dict(parse_override(text, "--set") for text in overrides or []),
            aggregation=parse_aggregation(mode, aggregation),
            data_dir=data,
            workers=workers,
            gpus=gpus,
            engine=engine,
            ray_address=ray_address,
            trackers=tuple(tracker or ()),
            out=out,
            resume=resume,
            start_version=start_version,
            publish=publish,
            store=store,
            json=json,
        )
    )
