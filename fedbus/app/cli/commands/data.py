"""`fedbus data`: what this machine's clients have captured. Reads their files; nothing goes over the bus."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.contracts.identifiers import client_id, task_id
from fedbus.stores.captured.export import check_format
from fedbus.stores.captured.export import export as write
from fedbus.stores.captured.reader import read_holdout_share, read_row_counts, size_on_disk_bytes

NO_HOLDOUT_SHARE: Final = (
    "an older fedbus wrote these rows, and not which share is held out: "
    "give the task's capture.holdout-share, as in --holdout 0.2"
)

ClientOption = Annotated[str | None, typer.Option(help="Only this client.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="Only this task.")]


def ls(*, client: ClientOption = None, task: TaskOption = None, json: output.JsonOption = False) -> None:
    """List what each client has captured: rows, and how many have a label."""
    found = [_database_facts(database) for database in _find_databases(client, task)]
    if json:
        print_json(found)
        return
    output.print_table(
        ("client", "task", "rows", "labelled", "size", "file"),
        [
            (
                one["client"],
                one["task"],
                str(one["rows"]),
                str(one["labelled"]),
                output.format_size(one["size_bytes"]),
                one["file"],
            )
            for one in found
        ],
        empty="nothing is captured on this machine yet",
    )


def export(
    path: Annotated[Path, typer.Argument(help="The file to write: it ends in .parquet or .arrow.")],
    *,
    client: ClientOption = None,
    task: TaskOption = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only rows whose truth is known.")] = False,
    holdout: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Mark so many as the rows that no training gets, instead of the task's `capture.holdout-share`.",
        ),
    ] = None,
) -> None:
    """Write a client's captured rows as a table, for pandas, DuckDB or Spark."""
    check_format(path)
    database = _find_single_database(client, task)
    expected = _database_facts(database)["labelled" if labelled else "rows"]
    share = read_holdout_share(database) if holdout is None else holdout
    if share is None:
        raise CliError(NO_HOLDOUT_SHARE, ExitCode.USAGE)
    with progress_bar("exporting rows", total=expected) as step:
        rows = write(
            database, path, holdout_share=share, labelled=labelled, on_batch=lambda more: step(more, "")
        )
    size = output.format_size(path.stat().st_size)
    output.console().print(f"{rows} rows of {_owner_of(database)} are in {path} ({size})", highlight=False)


def _find_databases(client: str | None, task: str | None) -> list[Path]:
    """The captured data of this machine's clients."""
    whose = client_id(client) if client else "*"
    what = task_id(task) if task else "*"
    return sorted((Settings.from_environment().home / "clients").glob(f"{whose}/{what}/captured.db"))


def _find_single_database(client: str | None, task: str | None) -> Path:
    """The only one that is meant."""
    found = _find_databases(client, task)
    if not found:
        raise CliError(
            "no such client has captured anything here: FEDBUS_HOME says where `here` is, "
            "and `fedbus data ls` what there is",
            ExitCode.NOT_FOUND,
        )
    if len(found) > 1:
        names = ", ".join(map(_owner_of, found))
        raise CliError(f"several have captured data: {names}. Choose by --client and --task", ExitCode.USAGE)
    return found[0]


def _owner_of(database: Path) -> str:
    return f"{database.parents[1].name}/{database.parent.name}"


def _database_facts(database: Path) -> dict[str, Any]:
    counted = read_row_counts(database, 0.0)
    return {
        "client": database.parents[1].name,
        "task": database.parent.name,
        "rows": counted.labelled + counted.unlabelled,
        "labelled": counted.labelled,
        "size_bytes": size_on_disk_bytes(database),
        "file": str(database),
    }
