"""`fedbus data`: what this machine's clients have captured. Reads their files; nothing goes over the bus."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedbus.app.failures import Exit, Failure
from fedbus.app.terminal import output

app = typer.Typer(
    no_args_is_help=True, help="What the clients on this machine have captured. It never leaves it by itself."
)

NO_SHARE: Final = (
    "an older fedbus wrote these rows, and not which share is held out: "
    "give the task's capture.holdout-share, as in --holdout 0.2"
)

Client = Annotated[str | None, typer.Option(help="Only this client.")]
OfTask = Annotated[str | None, typer.Option("--task", help="Only this task.")]


@app.command()
def ls(*, client: Client = None, task: OfTask = None, json: output.AsJson = False) -> None:
    """List what each client has captured: rows, and how many have a label."""
    found = [_counted(database) for database in _databases(client, task)]
    if json:
        output.as_json(found)
        return
    output.table(
        ("client", "task", "rows", "labelled", "size", "file"),
        [
            (
                one["client"],
                one["task"],
                str(one["rows"]),
                str(one["labelled"]),
                output.size(one["size_bytes"]),
                one["file"],
            )
            for one in found
        ],
        empty="nothing is captured on this machine yet",
    )


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="The file to write: it ends in .parquet or .arrow.")],
    *,
    client: Client = None,
    task: OfTask = None,
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
    from fedbus.app.terminal.progress_bar import working
    from fedbus.stores.captured.export import check_format
    from fedbus.stores.captured.export import export as write
    from fedbus.stores.captured.reader import kept_holdout_share

    check_format(path)
    database = _the_database(client, task)
    expected = _counted(database)["labelled" if labelled else "rows"]
    share = kept_holdout_share(database) if holdout is None else holdout
    if share is None:
        raise Failure(NO_SHARE, Exit.USAGE)
    with working("exporting rows", total=expected) as step:
        rows = write(database, path, holdout_share=share, labelled=labelled, told=lambda more: step(more, ""))
    size = output.size(path.stat().st_size)
    output.console().print(f"{rows} rows of {_whose(database)} are in {path} ({size})", highlight=False)


def _databases(client: str | None, task: str | None) -> list[Path]:
    """The captured data of this machine's clients."""
    from fedbus.app.settings import Settings
    from fedbus.contracts.identifiers import client_id, task_id

    whose = client_id(client) if client else "*"
    what = task_id(task) if task else "*"
    return sorted((Settings.from_environment().home / "clients").glob(f"{whose}/{what}/captured.db"))


def _the_database(client: str | None, task: str | None) -> Path:
    """The only one that is meant."""
    found = _databases(client, task)
    if not found:
        raise Failure(
            "no such client has captured anything here: FEDBUS_HOME says where `here` is, "
            "and `fedbus data ls` what there is",
            Exit.NOT_FOUND,
        )
    if len(found) > 1:
        names = ", ".join(map(_whose, found))
        raise Failure(f"several have captured data: {names}. Choose by --client and --task", Exit.USAGE)
    return found[0]


def _whose(database: Path) -> str:
    return f"{database.parents[1].name}/{database.parent.name}"


def _counted(database: Path) -> dict[str, Any]:
    from fedbus.stores.captured.reader import shares, size_bytes

    counted = shares(database, 0.0)
    return {
        "client": database.parents[1].name,
        "task": database.parent.name,
        "rows": counted.labelled + counted.unlabelled,
        "labelled": counted.labelled,
        "size_bytes": size_bytes(database),
        "file": str(database),
    }
