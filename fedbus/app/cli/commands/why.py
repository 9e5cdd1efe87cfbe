"""`fedbus why CLIENT`: in plain words, what a client does now, why it does not take part, and what it said before."""

from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from fedbus.app.bus_session import connect_bus, latest_messages, latest_transitions, run_async, transition_of
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientDeclined
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.server import ServerData, ServerEvent
from fedbus.contracts.serving import DataChecked, DataCounted
from fedbus.contracts.transition import Transition

MAX_DECLINES: Final = 5

STATE_TEXT: Final = {
    ("client", "s0"): "begins: it fetches the newest model",
    ("client", "pending_application"): "hands its inference agent a model",
    ("client", "serving"): "serves, and may be asked to train",
    ("client", "syncing"): "gets other code ready",
    ("client", "learning"): "takes part in {run}",
    ("client", "terminated"): "could not begin, and is started anew",
    ("fl_client", "waiting"): "trains nothing",
    ("fl_client", "pending"): "is ready to train in {run}",
    ("fl_client", "training"): "trains in {run}",
    ("fl_client", "finished"): "is done with {run}",
    ("inference", "empty"): "answers nothing: it has no model yet",
    ("inference", "serving"): "answers with v{model} at {endpoint}",
    ("inference", "updating"): "answers with v{model} at {endpoint}, and tries another beside it",
}
"""What each state is in words; in braces what the facts say."""
OWNER_TEXT: Final = {"client": "the client", "fl_client": "its trainer", "inference": "its predictor"}


def why(
    client: Annotated[str, typer.Argument(help="The client, as `fedbus clients ls` calls it.")],
    *,
    task: Annotated[str | None, typer.Option(help="Only in this task.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Say why a client does what it does, and why it does not take part in a run."""
    found = run_async(_load_clients(client_id(client), task))
    if json:
        print_json(found)
        return
    for one in found:
        _print_client(one)


def _print_client(one: dict[str, Any]) -> None:
    console = output.console()
    console.print(f"[bold]{one['client']}[/] in task [bold]{one['task']}[/]")
    for life in one["lives"]:
        reason = f": {life['reason']}" if life["reason"] else ""
        age = output.format_age(life["since"]).removesuffix(" ago")
        line = f"{life['says']}, since {age} ({life['event']}{reason})"
        console.print(f"  {OWNER_TEXT[life['kind']]:<14}{escape(printable(line))}")
    if trouble := one["trouble"]:
        line = f"its model repository is {trouble['kind']}, and no run can begin: {trouble['reason']}"
        console.print(f"  {'its server':<14}{escape(printable(line))}")
    if one["device"]:
        console.print(f"  {'its device':<14}{escape(printable(_describe_device(one['device'])))}")
    if one["data"]:
        data = one["data"]
        rows = f"{data['labelled']} labelled, {data['unlabelled']} unlabelled"
        console.print(f"  {'its data':<14}{rows}, counted {output.format_age(data['at'])}")
    if one["checked"]:
        console.print(f"  {'its checks':<14}{escape(printable(_describe_checks(one['checked'])))}")
    if not one["declined"]:
        console.print("  It has declined no run, as far as the log goes back.")
        return
    console.print("  It last declined:")
    for no in one["declined"]:
        console.print(f"    {no['run']}, {output.format_age(no['at'])}: {escape(printable(no['reason']))}")
    if rule := one["declined"][0]["rule"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in one["declined"][0]["facts"].items())
        console.print(f"  The rule: {escape(rule)}   (it had: {escape(figures)})")


def _describe_checks(checked: dict[str, Any]) -> str:
    """What is wrong with its newest rows, and whether they are as the training data were."""
    drift = "has drifted" if checked["drifting"] else "no drift"
    parts = [f"{one['check']}: {one['what']}" for one in checked["findings"] if not one["ok"]]
    parts += [f"drift is not looked for: {checked['drift_unknown']}" if checked["drift_unknown"] else drift]
    return f"{'; '.join(parts)} ({checked['rows']} rows, {output.format_age(checked['at'])})"


def _describe_device(device: dict[str, Any]) -> str:
    """How busy it is, what of it does not run, and what went wrong last."""
    heat = f", {device['temperature_c']:.0f} °C" if device["temperature_c"] is not None else ""
    parts = [f"cpu {device['cpu']:.0%}, memory {device['memory']:.0%}, disk {device['disk']:.0%}{heat}"]
    down = ", ".join(sorted(agent for agent, runs in device["agents"].items() if not runs))
    parts += [f"not running: {down}"] if down else []
    parts += [f"last error: {device['last_error']}"] if device["last_error"] else []
    return f"{'; '.join(parts)}, told {output.format_age(device['at'])}"


async def _load_clients(client: str, task: str | None) -> list[dict[str, Any]]:
    async with connect_bus() as bus:
        told = await latest_transitions(bus, *OWNER_TEXT, thing=f"{client}.{task or '*'}")
        if not told:
            raise CliError(await _missing_client_message(bus, client, task), ExitCode.NOT_FOUND)
        tasks = sorted({transition_of(seen).task for seen in told})
        return [
            await _client_facts(bus, client, one, [seen for seen in told if transition_of(seen).task == one])
            for one in tasks
        ]


async def _missing_client_message(bus: Bus, client: str, task: str | None) -> str:
    """That *client* is not here, or where it is: then it was asked for in another task."""
    tasks = sorted(
        {transition_of(seen).task for seen in await latest_transitions(bus, *OWNER_TEXT, thing=f"{client}.*")}
    )
    if not tasks:
        return f"no client {client} here. See: fedbus clients ls"
    return f"{client} has no task {task}: it is in {', '.join(tasks)}"


async def _client_facts(bus: Bus, client: str, task: str, told: list[StoredMessage]) -> dict[str, Any]:
    declined = await _events_of_kind(bus, ClientDeclined, client, task)
    counted = await latest_messages(bus, DataCounted, client=client, task=task)
    checked = await latest_messages(bus, DataChecked, client=client, task=task)
    reports = [seen for seen in await bus.latest(DeviceReport) if _is_from(seen, client, task)]
    return {
        "client": client,
        "task": task,
        "device": _message_facts(reports[-1]) if reports else None,
        "lives": [_lifecycle_facts(seen) for seen in told],
        "trouble": await _store_problem(bus, task),
        "data": _message_facts(counted[-1]) if counted else None,
        "checked": _message_facts(checked[-1]) if checked else None,
        "declined": [_message_facts(seen) for seen in reversed(declined[-MAX_DECLINES:])],
    }


async def _store_problem(bus: Bus, task: str) -> dict[str, Any] | None:
    """What is wrong with the server's model repository, where something is."""
    for server in await bus.states("server", task):
        if isinstance(server.facts, ServerData) and server.facts.trouble:
            is_about_it = server.event == ServerEvent.STORE_UNAVAILABLE
            reason = server.reason if is_about_it else server.event.replace("_", " ")
            return {"kind": str(server.facts.trouble), "reason": reason}
    return None


def _is_from(seen: StoredMessage, client: str, task: str) -> bool:
    return (getattr(seen.message, "client", None), seen.message.task) == (client, task)


async def _events_of_kind(bus: Bus, kind: type[Any], client: str, task: str) -> list[StoredMessage]:
    """All that the client has said of this *kind*, as far as the event stream goes back."""
    stream, subject = events_stream(bus.fed), subjects.wildcard_for(bus.fed, kind, client=client, task=task)
    last = await bus.last_per_subject(stream, [subject])
    found: list[StoredMessage] = []
    if last:
        async with bus.watch(stream, [subject], whole=True) as said:
            async for seen in said:
                found.append(seen)
                if seen.sequence >= last[-1].sequence:
                    break
    return found


def _message_facts(seen: StoredMessage) -> dict[str, Any]:
    return seen.message.model_dump() | {"at": seen.envelope.time}


def _lifecycle_facts(seen: StoredMessage) -> dict[str, Any]:
    move = transition_of(seen)
    return {
        "kind": move.kind,
        "state": move.target,
        "says": _describe_state(move),
        "event": move.event,
        "reason": move.reason,
        "since": seen.envelope.time,
    }


def _describe_state(move: Transition) -> str:
    model = getattr(move.facts, "model", None)
    return STATE_TEXT.get((move.kind, move.target), move.target).format(
        run=getattr(move.facts, "run", None) or "a run",
        model=model.version if model else "?",
        endpoint=getattr(move.facts, "endpoint", "") or "no address",
    )
