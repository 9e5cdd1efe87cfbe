"""`fedbus data partition`: divide a data set among clients, and show the label distribution."""

import shutil
from pathlib import Path
from typing import Annotated, Final

import typer

from fedbus.app.cli.simulation_options import clients_option, data_option, partition_option
from fedbus.app.failures import CliError, ExitCode, report_write_errors
from fedbus.app.settings import Settings
from fedbus.app.terminal import label_distribution as bars
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.learning.data import LabelDistribution, Partitioning, load_dataset, partition_labels
from fedbus.learning.data.label_plot import plot_label_distribution

PICTURE_FORMATS: Final = (".png", ".svg", ".pdf")
OTHER_COLUMNS_WIDTH: Final = 30
PIPE_WIDTH: Final = 100


def partition(
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder of a data set in the data folder, for example mnist; a path such as ./images; or hf:NAME."
        ),
    ],
    *,
    partition: Annotated[str, partition_option()] = "iid",
    clients: Annotated[int, clients_option()] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the samples of each client.")] = 0,
    data: Annotated[Path | None, data_option()] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw the label distribution in the terminal.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write a picture of the label distribution: .png, .svg or .pdf.")
    ] = None,
    json: output.JsonOption = False,
) -> None:
    """Divide a data set among clients, and show how many samples of each class they get.

    Apps get the same partitions from fedbus.learning.data; they are cached in FEDBUS_HOME/cache/data.
    """
    if out is not None and out.suffix not in PICTURE_FORMATS:
        raise CliError(
            f"cannot write {out}: use a name that ends with {', '.join(PICTURE_FORMATS)}", ExitCode.USAGE
        )
    partitioning = Partitioning.parse(partition)
    with progress_bar("dividing the data set", wanted=not json):
        found = load_dataset(dataset, data or Settings.from_environment().data_dir)
        partitions = partition_labels(found.train.labels, partitioning, clients, seed=seed)
        distribution = LabelDistribution.of(found.train.labels, partitions, found.class_names)
        if out is not None:
            title = f"{found.name}, {partitioning}, {pluralize(clients, 'client')}, seed {seed}"
            with report_write_errors(out):
                plot_label_distribution(distribution, out, title=title)
    if json:
        print_json(
            {"dataset": found.name, "partition": str(partitioning), "clients": clients, "seed": seed}
            | distribution.to_json()
        )
        return
    _print_summary(found.name, partitioning, distribution, seed)
    if show:
        _print_bars(distribution)
    if out is not None:
        output.print_note(f"wrote {out}")


def _print_summary(name: str, partitioning: Partitioning, distribution: LabelDistribution, seed: int) -> None:
    clients = len(distribution.counts)
    facts = {
        "data set": f"{name}, {distribution.sizes.sum() + distribution.unused.sum():,} training samples, "
        f"{len(distribution.class_names)} classes",
        "partition": f"{partitioning}, {pluralize(clients, 'client')}, seed {seed}",
        "samples per client": bars.render_range(distribution.sizes),
        "classes per client": bars.render_range(distribution.classes_per_client),
        "label skew": f"{distribution.skew:.2f} (mean distance from the labels of all clients: 0 equal, 1 disjoint)",
    }
    if unused := int(distribution.unused.sum()):
        absent = [
            name for name, count in zip(distribution.class_names, distribution.unused, strict=True) if count
        ]
        facts["not used"] = (
            f"{unused:,} samples of the classes {', '.join(absent)}: no client has these classes"
        )
    width = max(map(len, facts)) + 2
    console = output.console()
    for fact, value in facts.items():
        console.print(f"{fact:<{width}}{value}", highlight=False, markup=False)


def _print_bars(distribution: LabelDistribution) -> None:
    console = output.console()
    terminal_width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    chosen = bars.shown_clients(distribution.sizes)
    console.print()
    if len(chosen) < len(distribution.counts):
        text = f"{len(chosen)} of {len(distribution.counts):,} clients, from the smallest to the largest"
        console.print(text, highlight=False)
    rows = bars.distribution_rows(distribution, chosen, width=max(10, terminal_width - OTHER_COLUMNS_WIDTH))
    output.print_table(("client", "samples", "classes", "labels"), rows, empty="no clients")
    if bars.has_legend(distribution.class_names):
        console.print()
        console.print(bars.render_legend(distribution.class_names))
