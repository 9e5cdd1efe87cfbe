"""`fedbus why CLIENT`: what a client does now, and why it does not take part in runs."""

from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from fedbus.app.bus_session import connect_bus, latest_messages, latest_transitions, run_async, transition_of
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientDeclined
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.server import SERVER, ServerData, ServerEvent
from fedbus.contracts.serving import DataChecked, DataCounted
from fedbus.contracts.transition import Transition

MAX_DECLINES: Final = 5

STATE_TEXT: Final = {
    ("client", "s0"): "starts: it downloads the champion model",
    ("client", "pending_application"): "waits until its inference agent has loaded the model",
    ("client", "serving"): "serves predictions and can take part in a run",
    ("client", "syncing"): "prepares another code version",
    ("client", "learning"): "takes part in {run}",
    ("client", "terminated"): "failed to start and is restarted",
    ("fl_client", "waiting"): "does not train",
    ("fl_client", "pending"): "is ready to train in {run}",
    ("fl_client", "training"): "is training in {run}",
    ("fl_client", "finished"): "has finished {run}",
    ("inference", "empty"): "serves no predictions: it has no model yet",
    ("inference", "serving"): "serves v{model} at {endpoint}",
    ("inference", "updating"): "serves v{model} at {endpoint}, and compares a new model with it",
}
"""The description of each state; the names in braces come from the lifecycle data."""
LABELS: Final = {"client": "client", "fl_client": "training", "inference": "inference"}
"""The heading of the line for each lifecycle."""


def why(
    client: Annotated[str, typer.Argument(help="The client's id, from `fedbus clients ls`.")],
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Show what a client does now, and why it does not take part in runs."""
    clients = run_async(_load_clients(client_id(client), task))
    if json:
        print_json(clients)
        return
    for one in clients:
        _print_client(one)


def _print_client(one: dict[str, Any]) -> None:
    console = output.console()
    console.print(f"[bold]{one['client']}[/] in task [bold]{one['task']}[/]")
    for lifecycle in one["lives"]:
        reason = f": {lifecycle['reason']}" if lifecycle["reason"] else ""
        age = output.format_age(lifecycle["since"]).removesuffix(" ago")
        line = f"{lifecycle['says']}, since {age} ({lifecycle['event']}{reason})"
        console.print(f"  {LABELS[lifecycle['kind']]:<14}{escape(printable(line))}")
    if trouble := one["trouble"]:
        line = f"the model repository is {trouble['kind']}, so no run can start: {trouble['reason']}"
        console.print(f"  {'server':<14}{escape(printable(line))}")
    if one["device"]:
        console.print(f"  {'device':<14}{escape(printable(_describe_device(one['device'])))}")
    if one["data"]:
        data = one["data"]
        rows = f"{data['labelled']} labelled, {data['unlabelled']} unlabelled"
        console.print(f"  {'data':<14}{rows}, counted {output.format_age(data['at'])}")
    if one["checked"]:
        console.print(f"  {'data checks':<14}{escape(printable(_describe_checks(one['checked'])))}")
    if not one["declined"]:
        console.print("  no declined runs in the event stream")
        return
    console.print("  declined runs, newest first:")
    for declined in one["declined"]:
        age = output.format_age(declined["at"])
        console.print(f"    {declined['run']}, {age}: {escape(printable(declined['reason']))}")
    if rule := one["declined"][0]["rule"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in one["declined"][0]["facts"].items())
        console.print(f"  eligibility rule: {escape(rule)}   (values: {escape(figures)})")


def _describe_checks(checked: dict[str, Any]) -> str:
    """Describe the failed checks of the newest captured rows, and whether they have drifted."""
    drift = "drift" if checked["drifting"] else "no drift"
    parts = [f"{one['check']}: {one['what']}" for one in checked["findings"] if not one["ok"]]
    parts += [f"no drift check: {checked['drift_unknown']}" if checked["drift_unknown"] else drift]
    return f"{'; '.join(parts)} ({checked['rows']} rows, {output.format_age(checked['at'])})"


def _describe_device(device: dict[str, Any]) -> str:
    """Describe the load of the device, the agents that are not running, and its last error."""
    heat = f", {device['temperature_c']:.0f} °C" if device["temperature_c"] is not None else ""
    parts = [f"cpu {device['cpu']:.0%}, memory {device['memory']:.0%}, disk {device['disk']:.0%}{heat}"]
    down = ", ".join(sorted(agent for agent, runs in device["agents"].items() if not runs))
    parts += [f"not running: {down}"] if down else []
    parts += [f"last error: {device['last_error']}"] if device["last_error"] else []
    return f"{'; '.join(parts)}, reported {output.format_age(device['at'])}"


async def _load_clients(client: str, task: str | None) -> list[dict[str, Any]]:
    async with connect_bus() as bus:
        transitions = await latest_transitions(bus, *LABELS, key=f"{client}.{task or '*'}")
        if not transitions:
            raise CliError(await _missing_client_message(bus, client, task), ExitCode.NOT_FOUND)
        tasks = sorted({transition_of(stored).task for stored in transitions})
        return [
            await _client_facts(
                bus, client, one, [stored for stored in transitions if transition_of(stored).task == one]
            )
            for one in tasks
        ]


async def _missing_client_message(bus: Bus, client: str, task: str | None) -> str:
    """Explain that the client does not exist, or that it exists in other tasks only."""
    tasks = sorted(
        {transition_of(stored).task for stored in await latest_transitions(bus, *LABELS, key=f"{client}.*")}
    )
    if not tasks:
        return f"no client {client} in this federation. See: fedbus clients ls"
    return f"client {client} has no task {task}. Its tasks: {', '.join(tasks)}"


async def _client_facts(bus: Bus, client: str, task: str, transitions: list[StoredMessage]) -> dict[str, Any]:
    declined = await _events_of_kind(bus, ClientDeclined, client, task)
    counted = await latest_messages(bus, DataCounted, client=client, task=task)
    checked = await latest_messages(bus, DataChecked, client=client, task=task)
    reports = [stored for stored in await bus.last_per_device(DeviceReport) if _is_from(stored, client, task)]
    return {
        "client": client,
        "task": task,
        "device": _message_facts(reports[-1]) if reports else None,
        "lives": [_lifecycle_facts(stored) for stored in transitions],
        "trouble": await _store_problem(bus, task),
        "data": _message_facts(counted[-1]) if counted else None,
        "checked": _message_facts(checked[-1]) if checked else None,
        "declined": [_message_facts(stored) for stored in reversed(declined[-MAX_DECLINES:])],
    }


async def _store_problem(bus: Bus, task: str) -> dict[str, Any] | None:
    """Return the problem of the server's model repository; None if there is none."""
    for server in await bus.current_states(SERVER.kind, task):
        if isinstance(server.facts, ServerData) and server.facts.trouble:
            is_store_event = server.event == ServerEvent.STORE_UNAVAILABLE
            reason = server.reason if is_store_event else server.event.replace("_", " ")
            return {"kind": str(server.facts.trouble), "reason": reason}
    return None


def _is_from(stored: StoredMessage, client: str, task: str) -> bool:
    return (getattr(stored.message, "client", None), stored.message.task) == (client, task)


async def _events_of_kind(bus: Bus, kind: type[Any], client: str, task: str) -> list[StoredMessage]:
    """Return all messages of this *kind* from the client in the event stream."""
    stream, subject = events_stream(bus.fed), subjects.wildcard_for(bus.fed, kind, client=client, task=task)
    last = await bus.last_per_subject(stream, [subject])
    events: list[StoredMessage] = []
    if last:
        async with bus.read_stream(stream, [subject], whole=True) as messages:
            async for stored in messages:
                events.append(stored)
                if stored.sequence >= last[-1].sequence:
                    break
    return events


def _message_facts(stored: StoredMessage) -> dict[str, Any]:
    return stored.message.model_dump() | {"at": stored.envelope.time}


def _lifecycle_facts(stored: StoredMessage) -> dict[str, Any]:
    transition = transition_of(stored)
    return {
        "kind": transition.kind,
        "state": transition.target,
        "says": _describe_state(transition),
        "event": transition.event,
        "reason": transition.reason,
        "since": stored.envelope.time,
    }


def _describe_state(transition: Transition) -> str:
    model, not_served = (
        getattr(transition.facts, "model", None),
        getattr(transition.facts, "not_served", ""),
    )
    text = STATE_TEXT.get((transition.kind, transition.target), transition.target).format(
        run=getattr(transition.facts, "run", None) or "a run",
        model=model.version if model else "?",
        endpoint=getattr(transition.facts, "endpoint", "") or "no address",
    )
    match transition.kind, transition.target:
        case ("client", "serving") if not_served:
            return f"can take part in a run; {not_served}"
        case ("inference", "empty") if not_served:
            return f"serves no predictions: {not_served}"
        case ("inference", _) if not_served:
            return f"{text}; {not_served}"
        case _:
            return text
