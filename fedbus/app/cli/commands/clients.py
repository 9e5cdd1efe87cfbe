"""`fedbus clients`: who takes part, what each does now, and which model it serves."""

from collections import defaultdict
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from fedbus.app.bus_session import connect_bus, latest_messages, latest_transitions, run_async, transition_of
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.bus.bus import StoredMessage
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import ClientId, client_id
from fedbus.contracts.serving import DataChecked
from fedbus.contracts.transition import Transition
from fedbus.domain.client_scores import ClientStats, collect_client_stats, task_rounds

LIFECYCLE_KINDS: Final = ("client", "fl_client", "inference")
DEVICE_COLUMNS: Final = ("cpu", "memory", "disk", "heat", "gpu", "errors", "reported")


def ls(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Tell how the devices are, too.")] = False,
    json: output.JsonOption = False,
) -> None:
    """List all clients and how they stand."""
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
                f"v{one['model_version']}" if one["model_version"] else "",
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
    client: Annotated[str, typer.Argument(help="The client, as `fedbus clients ls` calls it.")],
    *,
    json: output.JsonOption = False,
) -> None:
    """Show one client: its three lifecycles, and what each waits for."""
    known = _load_clients(with_checks_of=client_id(client))
    found = [one for one in known if one["client"] == client_id(client)]
    if not found:
        names = ", ".join(sorted({one["client"] for one in known})) or "none yet"
        raise CliError(f"no client {client} here. Known are: {names}", ExitCode.NOT_FOUND)
    if json:
        print_json(found)
        return
    for one in found:
        serving = escape(printable(_describe_serving(one)))
        heading = f"[bold]{client}[/] in task [bold]{one['task']}[/]  {serving}"
        output.console().print(heading)
        output.print_table(
            ("lifecycle", "state", "on", "reason", "waits for", "until", "since"),
            [
                (
                    life["kind"],
                    output.state_text(life["state"]),
                    life["event"],
                    life["reason"],
                    life["waits_for"],
                    life["deadline"] or "",
                    output.format_age(life["since"]),
                )
                for life in one["lives"]
            ],
            empty="",
        )
        told = (
            _describe_stats(one["standing"]),
            _describe_device(one["device"]),
            _describe_live_accuracy(one["live"]),
        )
        for line in told:
            output.console().print(printable(line), markup=False)


def _describe_serving(one: dict[str, Any]) -> str:
    return (
        f"serves v{one['model_version']} at {one['endpoint']}" if one["model_version"] else "serves nothing"
    )


def _device_cells(device: dict[str, Any] | None) -> tuple[str, ...]:
    """How a device is, for the columns of `DEVICE`."""
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
        return "its device: nothing heard of it yet"
    cells = dict(zip(DEVICE_COLUMNS, _device_cells(device), strict=True))
    said = [f"{name} {cell}" for name, cell in cells.items() if cell and name not in ("errors", "reported")]
    said += [f"{name} does not run" for name, runs in device["agents"].items() if not runs]
    if device["errors"]:
        said.append(f"{device['errors']} error lines (last: {device['last_error']})")
    return f"its device {cells['reported']}: {', '.join(said)}"


def _describe_live_accuracy(live: list[dict[str, Any]]) -> str:
    """How often its models were right, by what its users have told: the newest first."""
    told = [
        f"v{one['version']} {one['right'] / one['labelled']:.1%} of {one['labelled']}"
        for one in sorted(live, key=lambda one: -one["version"])
    ]
    return f"right of the newest answers whose truth is known: {', '.join(told) or 'nothing is known of any'}"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _describe_stats(standing: dict[str, Any]) -> str:
    """What it has done so far, as the rounds in the log tell."""
    parts = [
        f"{standing['rounds']} round{'s' if standing['rounds'] != 1 else ''}",
        f"{standing['failed']} failed",
    ]
    if standing["last_failure"]:
        parts[-1] += f" (last: {standing['last_failure']})"
    parts.append(f"reliability {standing['reliability']:.2f}")
    if standing["samples"]:
        parts.append(f"{standing['samples']} samples")
    if standing["train_s"] is not None:
        parts.append(f"{standing['train_s']:.2f} s a training")
    if standing["contribution"] is not None:
        parts.append(f"contribution {standing['contribution']:.4g}")
    return "so far: " + ", ".join(parts)


def _load_clients(with_checks_of: ClientId | None = None) -> list[dict[str, Any]]:
    """What the log says of every client in every task: its three lifecycles put together.

    What the checks of its data found is told of one only: of all, that may be much.
    """

    async def look() -> tuple[list[StoredMessage], list[StoredMessage], list[StoredMessage]]:
        async with connect_bus() as bus:
            return (
                await latest_transitions(bus, *LIFECYCLE_KINDS, "run"),
                await bus.latest(DeviceReport),
                await latest_messages(bus, DataChecked, client=with_checks_of) if with_checks_of else [],
            )

    told: dict[str, dict[str, StoredMessage]] = defaultdict(dict)
    found, reports, checks = run_async(look())
    live = {thing: facts["live"] for seen in checks for thing, facts in [_device_facts(seen)]}
    devices = {thing: facts for seen in reports for thing, facts in [_device_facts(seen)]}
    runs = [move for seen in found if (move := transition_of(seen)).kind == "run"]
    for seen in found:
        if transition_of(seen).kind == "run":
            continue
        *_, kind, client, task = seen.subject.split(".")
        told[f"{client}.{task}"][kind] = seen
    return [
        _client_facts(thing, lives)
        | {"standing": _client_stats(thing, runs), "device": devices.get(thing), "live": live.get(thing, [])}
        for thing, lives in told.items()
    ]


def _device_facts(seen: StoredMessage) -> tuple[str, dict[str, Any]]:
    """Which client in which task has reported, and what."""
    facts = seen.message.model_dump()
    return f"{facts.pop('client')}.{facts.pop('task')}", facts | {"at": seen.envelope.time}


def _client_stats(thing: str, runs: list[Transition]) -> dict[str, Any]:
    """What the client has done so far in the task, as the rounds in the log tell."""
    client, task = thing.split(".")
    standing = collect_client_stats(task_rounds(task, runs)).get(client, ClientStats())
    return vars(standing) | {"reliability": standing.reliability}


def _client_facts(thing: str, told: dict[str, StoredMessage]) -> dict[str, Any]:
    client, task = thing.split(".")
    lives = [_lifecycle_facts(seen) for seen in told.values()]
    state = {life["kind"]: life["state"] for life in lives}
    facts = [seen.message.facts for seen in told.values()]  # type: ignore[attr-defined]
    served = next((one.model for one in facts if one.kind == "inference"), None)
    return {
        "client": client,
        "task": task,
        "state": state.get("client", ""),
        "training": state.get("fl_client", ""),
        "inference": state.get("inference", ""),
        "model_version": served.version if served else None,
        "sha256": served.sha256 if served else None,
        "run": next((one.run for one in facts if getattr(one, "run", None)), None),
        "endpoint": next((one.endpoint for one in facts if getattr(one, "endpoint", "")), ""),
        "since": max(life["since"] for life in lives),
        "lives": lives,
    }


def _lifecycle_facts(seen: StoredMessage) -> dict[str, Any]:
    move = transition_of(seen)
    return {
        "kind": move.kind,
        "state": move.target,
        "event": move.event,
        "reason": move.reason,
        "waits_for": move.waits_for,
        "deadline": move.deadline,
        "since": seen.envelope.time,
    }
