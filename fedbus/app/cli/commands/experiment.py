"""`fedbus experiment`: the experiments of the papers, and the comparison of two algorithms, as simulations."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from fedbus.app.cli.simulation_options import (
    clients_option,
    data_option,
    overrides_option,
    partition_option,
    profile_option,
    rounds_option,
)
from fedbus.app.failures import CliError, ExitCode, report_write_errors
from fedbus.app.terminal import output
from fedbus.app.terminal.experiment_progress import ExperimentProgress
from fedbus.app.terminal.plain import print_json
from fedbus.learning.data import Partitioning
from fedbus.simulation.experiments.catalog import EXPERIMENTS
from fedbus.simulation.experiments.compare import CompareExperiment, parse_settings, parse_variant
from fedbus.simulation.experiments.continual import ContinualExperiment
from fedbus.simulation.experiments.datasets import DATASETS
from fedbus.simulation.experiments.delay import DelayExperiment
from fedbus.simulation.experiments.devices import DevicesExperiment
from fedbus.simulation.experiments.experiment import (
    Experiment,
    FinishedExperiment,
    run_experiment,
    seeds_from,
)
from fedbus.simulation.experiments.heterogeneity import ALGORITHMS, HeterogeneityExperiment
from fedbus.simulation.experiments.report import format_seconds
from fedbus.simulation.experiments.training import VISION, load_task, name_profile
from fedbus.simulation.settings import usable_cores

OUTPUT: Final = "experiments"
"""The directory for the results of all experiments, in the current directory."""

Quick = Annotated[bool, typer.Option("--quick", help="A small version, to see that everything works.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the results.", show_default=f"{OUTPUT}/NAME, with --quick {OUTPUT}/NAME-quick"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="The first seed.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Repeat with this number of seeds, from --seed on.")]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Cells computed at once.", show_default="the number of cores"),
]
Data = Annotated[Path | None, data_option()]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute all cells again, also those with a result.")]


def ls(*, json: output.JsonOption = False) -> None:
    """List the experiments."""
    if json:
        print_json([{"name": one.name, "summary": one.summary, "source": one.source} for one in EXPERIMENTS])
        return
    output.print_table(
        ("name", "what it shows", "source"),
        [(one.name, one.summary, one.source) for one in EXPERIMENTS],
        empty="there are no experiments",
    )


def delay(
    *,
    real: Annotated[
        bool,
        typer.Option("--real", help="Use the real clock: clients sleep. Without it, the clock is virtual."),
    ] = False,
    quick: Quick = False,
    out: Out = None,
    seed: Seed = 1,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    data: Data = None,
    fresh: Fresh = False,
) -> None:
    """Measure the time of a run under delays, and with the modes deadline and buffered."""
    experiment = DelayExperiment(seeds_from(seed, seeds), data, is_quick=quick, is_real=real)
    if real and quick:  # real seconds: a part of the grid
        experiment = replace(experiment, delays_s=(5.0,), probabilities=(0.0, 0.4, 1.0))
    name = "delay-real" if real else "delay"
    run(experiment, name, quick=quick, out=out, jobs=1 if real else jobs, fresh=fresh)


def heterogeneity(
    *,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="mnist, fashion-mnist or cifar-10. Repeatable.", show_default="all that are there"),
    ] = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(help="FedAvg, FedProx, SCAFFOLD or FedAdam. Repeatable.", show_default="all"),
    ] = None,
    quick: Quick = False,
    out: Out = None,
    seed: Seed = 1,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    data: Data = None,
    fresh: Fresh = False,
) -> None:
    """Measure local and global accuracy with IID, imbalanced and skewed data, for four algorithms."""
    chosen = _choose(algorithm, tuple(ALGORITHMS), "algorithm")
    keys = tuple(dataset or (one.key for one in DATASETS))
    experiment = HeterogeneityExperiment(
        seeds_from(seed, seeds), data, is_quick=quick, datasets=keys, algorithms=chosen
    )
    for line in experiment.found.skipped:
        output.print_note(line)
    run(experiment, "heterogeneity", quick=quick, out=out, jobs=jobs, fresh=fresh)


def devices(
    *,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Slow devices by a profile in virtual time, not by limits of the CPU time."
        ),
    ] = False,
    quick: Quick = False,
    out: Out = None,
    seed: Seed = 1,
    seeds: Seeds = 1,
    data: Data = None,
    fresh: Fresh = False,
) -> None:
    """Measure the time of rounds with three groups of unequal devices."""
    experiment = DevicesExperiment(seeds_from(seed, seeds), data, is_quick=quick, use_profile=profile)
    name = "devices-profile" if profile else "devices"
    run(experiment, name, quick=quick, out=out, jobs=1, fresh=fresh)


def continual(
    *,
    quick: Quick = False,
    out: Out = None,
    seed: Seed = 1,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    data: Data = None,
    fresh: Fresh = False,
) -> None:
    """Run five runs in a row, and check that each begins with the loss that the last one ended with."""
    experiment = ContinualExperiment(seeds_from(seed, seeds), data, is_quick=quick)
    run(experiment, "continual", quick=quick, out=out, jobs=jobs, fresh=fresh)


def compare(
    a: Annotated[
        str, typer.Argument(help="A strategy, an aggregation mode, key=value,… or the directory of a task.")
    ],
    b: Annotated[str, typer.Argument(help="The same for the other side.")],
    *,
    task: Annotated[
        Path | None,
        typer.Option(help="Directory of the task.", show_default="image classification with a CNN"),
    ] = None,
    clients: Annotated[int, clients_option()] = 10,
    rounds: Annotated[int | None, rounds_option(show_default="10")] = None,
    partition: Annotated[str, partition_option()] = "iid",
    set_: Annotated[list[str] | None, overrides_option(of=" of both sides")] = None,
    profile: Annotated[str | None, profile_option()] = None,
    metric: Annotated[
        str, typer.Option(help="accuracy, loss or local_accuracy: what the verdict is about.")
    ] = "accuracy",
    quick: Quick = False,
    out: Out = None,
    seed: Seed = 1,
    seeds: Seeds = 5,
    jobs: Jobs = None,
    data: Data = None,
    fresh: Fresh = False,
) -> None:
    """Compare two strategies or configurations on the same partitions and seeds, with confidence intervals."""
    path = task or VISION
    common = {}
    if task is None:  # the fully connected network learns enough in seconds to show a difference
        common = {
            "max-samples": 300,
            "test-samples": 1000 if quick else 4000,
            "model": "mlp" if quick else "cnn",
        }
    _, overrides = parse_settings(",".join(set_), load_task(path)) if set_ else ({}, {})
    experiment = CompareExperiment(
        seeds_from(seed, seeds),
        parse_variant(a, path),
        parse_variant(b, path),
        clients=clients,
        rounds=rounds or (3 if quick and task is not None else 10),
        partition=str(Partitioning.parse(partition)),
        data_dir=data,
        metric=metric,
        common=common | overrides,
        profile=name_profile(profile) if profile else None,
    )
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", f"compare-{experiment.first.name}-{experiment.second.name}")[
        :100
    ]
    run(experiment, name, quick=quick, out=out, jobs=jobs, fresh=fresh)


def _choose(chosen: list[str] | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the *known* names that are *chosen*, in any case; all without a choice. Raises CliError."""
    by_name = {one.lower(): one for one in known}
    for one in chosen or ():
        if one.lower() not in by_name:
            raise CliError(f"unknown {what} {one!r}. Choose from {', '.join(known)}", ExitCode.USAGE)
    return tuple(by_name[one.lower()] for one in chosen) if chosen else tuple(known)


# --- running ----------------------------------------------------------------------------------


def run(
    experiment: Experiment, name: str, *, quick: bool, out: Path | None, jobs: int | None, fresh: bool
) -> None:
    """Run *experiment*, and print its results and files."""
    directory = out or Path(OUTPUT) / (f"{name}-quick" if quick else name)
    command = shlex.join(["fedbus", *sys.argv[1:]])
    with report_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        with ExperimentProgress(Console(stderr=True)) as progress:
            finished = run_experiment(
                experiment,
                directory,
                jobs=jobs or usable_cores(),
                command=command,
                observer=progress,
                fresh=fresh,
            )
    except KeyboardInterrupt:
        output.print_note(f"interrupted. The finished cells are in {directory}; the same command continues")
        raise
    print_results(finished, directory, reused=progress.reused_count)
    if finished.results.failures:
        count = len(finished.results.failures)
        raise CliError(
            f"{count} {'cell' if count == 1 else 'cells'} failed. The reasons are in {directory}/README.md; the same "
            "command computes only these cells again",
            ExitCode.FAILED,
        )


def print_results(finished: FinishedExperiment, directory: Path, *, reused: int) -> None:
    """Print the tables and findings."""
    report, console = finished.report, output.console()
    for table in report.tables:
        console.print(f"\n[bold]{table.title}[/]")
        output.print_table(table.headings, table.rows, empty="no rows")
        if table.note:
            console.print(table.note, style="dim", markup=False)
    console.print()
    for finding in report.findings:
        console.print(f"- {finding.mark}{finding.text}", markup=False)
    records = finished.results.records
    seconds = format_seconds(sum(record.wall_s for record in records))
    stored = f", {reused} of them stored before" if reused else ""
    console.print(f"\n{len(records)} cells{stored}; computing time {seconds}", markup=False)
    console.print(f"results: {_list_files(finished.files, directory)}", markup=False)


def _list_files(files: Sequence[Path], directory: Path) -> str:
    return f"{directory}/ with {', '.join(file.name for file in files)}"
