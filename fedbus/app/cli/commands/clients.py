"""`fedbus clients`: the clients, their states and the models that they serve."""

from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from fedbus.app.bus_session import connect_bus, run_async
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json, printable
from fedbus.app.views.client_records import load_client_records
from fedbus.contracts.identifiers import ClientId, client_id

DEVICE_COLUMNS: Final = ("cpu", "memory", "disk", "heat", "gpu", "errors", "reported")


def ls(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Add columns with the load of the devices.")] = False,
    json: output.JsonOption = False,
) -> None:
    """List all clients with their states, models and rounds."""
    clients = [one for one in _load_clients() if task in (None, one["task"])]
    if json:
        print_json(clients)
        return
    output.print_table(
        (
            *("client", "task", "state", "training", "inference", "model", "run"),
            *("rounds", "failed", "contribution", "endpoint", "since"),
            *(DEVICE_COLUMNS if wide else ()),
        ),
        [
            (
                one["client"],
                one["task"],
                output.state_text(one["state"]),
                output.state_text(one["training"]),
                output.state_text(one["inference"]),
                _describe_model(one),
                one["run"] or "",
                one["standing"]["rounds"],
                one["standing"]["failed"],
                _format_number(one["standing"]["contribution"]),
                one["endpoint"],
                output.format_age(one["since"]),
                *(_device_cells(one["device"]) if wide else ()),
            )
            for one in clients
        ],
        empty="no clients yet. Start one: fedbus client up c1",
        least=("endpoint", "contribution", "run", "failed", "rounds", "task"),
    )


def show(
    client: Annotated[str, typer.Argument(help="The client's id, from `fedbus clients ls`.")],
    *,
    json: output.JsonOption = False,
) -> None:
    """Show one client: its lifecycles, what each waits for, its device and its accuracy."""
    clients = _load_clients(with_checks_of=client_id(client))
    matching = [one for one in clients if one["client"] == client_id(client)]
    if not matching:
        names = ", ".join(sorted({one["client"] for one in clients})) or "none yet"
        raise CliError(f"no client {client} in this federation. Known clients: {names}", ExitCode.NOT_FOUND)
    if json:
        print_json(matching)
        return
    for one in matching:
        serving = escape(printable(_describe_serving(one)))
        heading = f"[bold]{client}[/] in task [bold]{one['task']}[/]  {serving}"
        output.console().print(heading)
        output.print_table(
            ("lifecycle", "state", "event", "reason", "waits for", "deadline", "since"),
            [
                (
                    lifecycle["kind"],
                    output.state_text(lifecycle["state"]),
                    lifecycle["event"],
                    lifecycle["reason"],
                    lifecycle["waits_for"],
                    lifecycle["deadline"] or "",
                    output.format_age(lifecycle["since"]),
                )
                for lifecycle in one["lives"]
            ],
            empty="",
        )
        lines = (
            _describe_stats(one["standing"]),
            _describe_device(one["device"]),
            _describe_live_accuracy(one["live"]),
        )
        for line in lines:
            output.console().print(printable(line), markup=False)


def _describe_model(one: dict[str, Any]) -> str:
    """Describe the version that the client serves, and the newer one that it has taken and does not serve."""
    served = f"v{one['model_version']}" if one["model_version"] else ""
    taken = f"v{one['taken_version']} not served" if one["not_served"] and one["taken_version"] else ""
    return ", ".join(filter(None, (served, taken)))


def _describe_serving(one: dict[str, Any]) -> str:
    served = (
        f"serves v{one['model_version']} at {one['endpoint']}" if one["model_version"] else "serves nothing"
    )
    return "; ".join(filter(None, (served, one["not_served"])))


def _device_cells(device: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the cells of `DEVICE_COLUMNS`."""
    if device is None:
        return ("",) * len(DEVICE_COLUMNS)
    heat = device["temperature_c"]
    return (
        *(f"{device[name]:.0%}" for name in ("cpu", "memory", "disk")),
        "" if heat is None else f"{heat:.0f} °C",
        ", ".join(f"{gpu['utilization']:.0%}" for gpu in device["gpus"]),
        str(device["errors"] or ""),
        output.format_age(device["at"]),
    )


def _describe_device(device: dict[str, Any] | None) -> str:
    if device is None:
        return "device: no report yet"
    cells = dict(zip(DEVICE_COLUMNS, _device_cells(device), strict=True))
    parts = [f"{name} {cell}" for name, cell in cells.items() if cell and name not in ("errors", "reported")]
    parts += [f"{name} is not running" for name, runs in device["agents"].items() if not runs]
    if device["errors"]:
        parts.append(f"{device['errors']} error lines (last: {device['last_error']})")
    return f"device {cells['reported']}: {', '.join(parts)}"


def _describe_live_accuracy(live: list[dict[str, Any]]) -> str:
    """Describe the accuracy of its models on the predictions that have a label, newest version first."""
    accuracies = [
        f"v{one['version']} {one['right'] / one['labelled']:.1%} of {one['labelled']}"
        for one in sorted(live, key=lambda one: -one["version"])
    ]
    return f"live accuracy: {', '.join(accuracies) or 'no labelled predictions'}"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _describe_stats(stats: dict[str, Any]) -> str:
    """Describe its rounds so far, from the transitions of all runs."""
    parts = [
        pluralize(stats["rounds"], "round"),
        f"{stats['failed']} failed",
    ]
    if stats["last_failure"]:
        parts[-1] += f" (last: {stats['last_failure']})"
    parts.append(f"reliability {stats['reliability']:.2f}")
    if stats["samples"]:
        parts.append(f"{stats['samples']} samples")
    if stats["train_s"] is not None:
        parts.append(f"{stats['train_s']:.2f} s per training")
    if stats["contribution"] is not None:
        parts.append(f"contribution {stats['contribution']:.4g}")
    return "so far: " + ", ".join(parts)


def _load_clients(with_checks_of: ClientId | None = None) -> list[dict[str, Any]]:
    async def load() -> list[dict[str, Any]]:
        async with connect_bus() as bus:
            return await load_client_records(bus, with_checks_of=with_checks_of)

    return run_async(load())
