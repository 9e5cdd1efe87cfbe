"""`fedbus clients`: who takes part, what each does now, and which model it serves."""

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app.failures import Exit, Failure
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.bus.bus import Seen
    from fedbus.contracts.identifiers import ClientId
    from fedbus.contracts.transition import Transition

app = typer.Typer(no_args_is_help=True, help="Who takes part, what each does now, which model it serves.")

KINDS: Final = ("client", "fl_client", "inference")
DEVICE: Final = ("cpu", "memory", "disk", "heat", "gpu", "errors", "reported")


@app.command()
def ls(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Tell how the devices are, too.")] = False,
    json: output.AsJson = False,
) -> None:
    """List all clients and how they stand."""
    clients = [one for one in _clients() if task in (None, one["task"])]
    if json:
        output.as_json(clients)
        return
    output.table(
        (
            *("client", "task", "state", "training", "inference", "model", "run"),
            *("rounds", "failed", "contribution", "endpoint", "since"),
            *(DEVICE if wide else ()),
        ),
        [
            (
                one["client"],
                one["task"],
                output.state(one["state"]),
                output.state(one["training"]),
                output.state(one["inference"]),
                f"v{one['model_version']}" if one["model_version"] else "",
                one["run"] or "",
                one["standing"]["rounds"],
                one["standing"]["failed"],
                _figure(one["standing"]["contribution"]),
                one["endpoint"],
                output.ago(one["since"]),
                *(_device_in_cells(one["device"]) if wide else ()),
            )
            for one in clients
        ],
        empty="no clients yet. Start one: fedbus client up c1",
        least=("endpoint", "contribution", "run", "failed", "rounds", "task"),
    )


@app.command("show")
def show_(
    client: Annotated[str, typer.Argument(help="The client, as `fedbus clients ls` calls it.")],
    *,
    json: output.AsJson = False,
) -> None:
    """Show one client: its three lifecycles, and what each waits for."""
    from rich.markup import escape

    from fedbus.contracts.identifiers import client_id

    known = _clients(with_checks_of=client_id(client))
    found = [one for one in known if one["client"] == client_id(client)]
    if not found:
        names = ", ".join(sorted({one["client"] for one in known})) or "none yet"
        raise Failure(f"no client {client} here. Known are: {names}", Exit.NOT_FOUND)
    if json:
        output.as_json(found)
        return
    for one in found:
        heading = (
            f"[bold]{client}[/] in task [bold]{one['task']}[/]  {escape(output.printable(_serves(one)))}"
        )
        output.console().print(heading)
        output.table(
            ("lifecycle", "state", "on", "reason", "waits for", "until", "since"),
            [
                (
                    life["kind"],
                    output.state(life["state"]),
                    life["event"],
                    life["reason"],
                    life["waits_for"],
                    life["deadline"] or "",
                    output.ago(life["since"]),
                )
                for life in one["lives"]
            ],
            empty="",
        )
        told = (
            _standing_in_words(one["standing"]),
            _device_in_words(one["device"]),
            _live_in_words(one["live"]),
        )
        for line in told:
            output.console().print(output.printable(line), markup=False)


def _serves(one: dict[str, Any]) -> str:
    return (
        f"serves v{one['model_version']} at {one['endpoint']}" if one["model_version"] else "serves nothing"
    )


def _device_in_cells(device: dict[str, Any] | None) -> tuple[str, ...]:
    """How a device is, for the columns of `DEVICE`."""
    if device is None:
        return ("",) * len(DEVICE)
    heat = device["temperature_c"]
    return (
        *(f"{device[name]:.0%}" for name in ("cpu", "memory", "disk")),
        "" if heat is None else f"{heat:.0f} °C",
        ", ".join(f"{gpu['utilization']:.0%}" for gpu in device["gpus"]),
        str(device["errors"] or ""),
        output.ago(device["at"]),
    )


def _device_in_words(device: dict[str, Any] | None) -> str:
    if device is None:
        return "its device: nothing heard of it yet"
    cells = dict(zip(DEVICE, _device_in_cells(device), strict=True))
    said = [f"{name} {cell}" for name, cell in cells.items() if cell and name not in ("errors", "reported")]
    said += [f"{name} does not run" for name, runs in device["agents"].items() if not runs]
    if device["errors"]:
        said.append(f"{device['errors']} error lines (last: {device['last_error']})")
    return f"its device {cells['reported']}: {', '.join(said)}"


def _live_in_words(live: list[dict[str, Any]]) -> str:
    """How often its models were right, by what its users have told: the newest first."""
    told = [
        f"v{one['version']} {one['right'] / one['labelled']:.1%} of {one['labelled']}"
        for one in sorted(live, key=lambda one: -one["version"])
    ]
    return f"right of the newest answers whose truth is known: {', '.join(told) or 'nothing is known of any'}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _standing_in_words(standing: dict[str, Any]) -> str:
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


def _clients(with_checks_of: "ClientId | None" = None) -> list[dict[str, Any]]:
    """What the log says of every client in every task: its three lifecycles put together.

    What the checks of its data found is told of one only: of all, that may be much.
    """
    from fedbus.app.bus_session import last_said, lives, moved, now, on_the_bus
    from fedbus.contracts.device import DeviceReport
    from fedbus.contracts.serving import DataChecked

    async def look() -> "tuple[list[Seen], list[Seen], list[Seen]]":
        async with on_the_bus() as bus:
            return (
                await lives(bus, *KINDS, "run"),
                await bus.latest(DeviceReport),
                await last_said(bus, DataChecked, client=with_checks_of) if with_checks_of else [],
            )

    told: dict[str, dict[str, Seen]] = defaultdict(dict)
    found, reports, checks = now(look())
    live = {thing: facts["live"] for seen in checks for thing, facts in [_device(seen)]}
    devices = {thing: facts for seen in reports for thing, facts in [_device(seen)]}
    runs = [move for seen in found if (move := moved(seen)).kind == "run"]
    for seen in found:
        if moved(seen).kind == "run":
            continue
        *_, kind, client, task = seen.subject.split(".")
        told[f"{client}.{task}"][kind] = seen
    return [
        _client(thing, lives)
        | {"standing": _standing(thing, runs), "device": devices.get(thing), "live": live.get(thing, [])}
        for thing, lives in told.items()
    ]


def _device(seen: "Seen") -> "tuple[str, dict[str, Any]]":
    """Which client in which task has reported, and what."""
    facts = seen.message.model_dump()
    return f"{facts.pop('client')}.{facts.pop('task')}", facts | {"at": seen.envelope.time}


def _standing(thing: str, runs: "list[Transition]") -> dict[str, Any]:
    """What the client has done so far in the task, as the rounds in the log tell."""
    from fedbus.domain.client_scores import Standing, rounds_of, standings

    client, task = thing.split(".")
    standing = standings(rounds_of(task, runs)).get(client, Standing())
    return vars(standing) | {"reliability": standing.reliability}


def _client(thing: str, told: "dict[str, Seen]") -> dict[str, Any]:
    client, task = thing.split(".")
    lives = [_life(seen) for seen in told.values()]
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


def _life(seen: "Seen") -> dict[str, Any]:
    from fedbus.app.bus_session import moved

    move = moved(seen)
    return {
        "kind": move.kind,
        "state": move.target,
        "event": move.event,
        "reason": move.reason,
        "waits_for": move.waits_for,
        "deadline": move.deadline,
        "since": seen.envelope.time,
    }
