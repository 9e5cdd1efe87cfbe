"""`fedbus simulate`: run a task on virtual clients on this machine, or the agents of a fleet under virtual time."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from fedbus.app.cli.options import (
    AggregationOption,
    ModeOption,
    parse_aggregation,
    parse_duration,
    split_override,
)
from fedbus.app.cli.simulation_options import (
    clients_option,
    data_option,
    overrides_option,
    partition_option,
    profile_option,
    rounds_option,
)
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.simulate.fleet import FleetOptions, run_fleet
from fedbus.app.simulate.options import SimulateOptions
from fedbus.app.simulate.run import run_simulate
from fedbus.app.terminal import output

DATA: Final = "Data"
MACHINE: Final = "Machine"
RESULTS: Final = "Results"
MODELS: Final = "Model repository"
FLEET: Final = "Fleet under virtual time"


def simulate(
    task: Annotated[
        str, typer.Argument(help="The task: a directory, or git+https://host/repo@branch#subdirectory=dir.")
    ] = ".",
    *,
    clients: Annotated[int | None, clients_option(show_default="10")] = None,
    cohort: Annotated[
        int | None,
        typer.Option(min=1, help="Clients that train in each round.", show_default="the strategy's sampling"),
    ] = None,
    rounds: Annotated[int | None, rounds_option(show_default="the task's")] = None,
    partition: Annotated[str | None, partition_option(show_default="the app's own", panel=DATA)] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of cohorts, partitions and the app's random numbers.", show_default="0"
        ),
    ] = None,
    overrides: Annotated[list[str] | None, overrides_option()] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of worker processes.",
            show_default="one for each core",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    mode: ModeOption = None,
    aggregation: AggregationOption = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="The same bits for any number of workers, and on a fleet; slower."
        ),
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=0, help="Number of GPUs that the workers share.", rich_help_panel=MACHINE)
    ] = 0,
    profile: Annotated[str | None, profile_option()] = None,
    data: Annotated[Path | None, data_option(panel=DATA)] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Where workers run: on this machine, or in a Ray cluster.", rich_help_panel=MACHINE
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster.",
            show_default="a new one on this machine",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help="Experiment tracker: tensorboard, mlflow or wandb. Repeatable.",
            show_default="FEDBUS_TRACKERS",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results.",
            show_default="FEDBUS_HOME/simulations/TASK-sim-N",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the simulation in --out, or the task's last one.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    start_version: Annotated[
        str,
        typer.Option(
            "--from",
            help="Start from a version of the model repository: champion, latest or 3.",
            show_default="the task's first model",
            rich_help_panel=MODELS,
        ),
    ] = "",
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Publish the model as a version of the model repository.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    store: Annotated[
        str,
        typer.Option(
            help="The model repository: a directory, or s3://bucket/prefix.",
            show_default="FEDBUS_STORE",
            rich_help_panel=MODELS,
        ),
    ] = "",
    fleet: Annotated[
        bool,
        typer.Option(
            "--fleet",
            help="Simulate the server, the scheduler and the agents of all clients; training takes virtual time only.",
            rich_help_panel=FLEET,
        ),
    ] = False,
    duration: Annotated[
        str | None,
        typer.Option(help="Virtual time: 90s, 10m, 2h.", show_default="1h", rich_help_panel=FLEET),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(
            help="Virtual time between two runs: 10m.",
            show_default="the task's, or 10m",
            rich_help_panel=FLEET,
        ),
    ] = None,
    train_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of one training.", show_default="10", rich_help_panel=FLEET),
    ] = None,
    json: output.JsonOption = False,
) -> None:
    """Simulate a task with virtual clients on this machine: the same app as on a fleet."""
    of_fleet = {"--duration": duration, "--every": every, "--train-s": train_s}
    of_training = {
        "--partition": partition,
        "--set": overrides,
        "--workers": workers,
        "--mode": mode,
        "--aggregation": aggregation,
        "--deterministic": deterministic,
        "--gpus": gpus,
        "--data": data,
        "--engine": engine != "local",
        "--ray-address": ray_address,
        "--tracker": tracker,
        "--resume": resume,
        "--from": start_version,
        "--publish": publish,
        "--store": store,
    }
    if fleet:
        _refuse(of_training, "--fleet does not train, so it is not possible with")
        run_fleet(
            FleetOptions(
                task=task,
                clients=clients,
                cohort=cohort,
                rounds=rounds,
                seed=seed,
                profile=profile,
                duration_s=None if duration is None else parse_duration(duration),
                every_s=None if every is None else parse_duration(every),
                train_s=train_s,
                out=out,
                json=json,
            )
        )
        return
    _refuse(of_fleet, "add --fleet for")
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
            overrides=dict(split_override(text, "--set") for text in overrides or []),
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


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Raise CliError if one of *options* is given."""
    given = [name for name, value in options.items() if value]
    if given:
        raise CliError(f"{reason} {', '.join(given)}", ExitCode.USAGE)
