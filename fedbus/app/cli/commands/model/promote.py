"""`fedbus model promote`, `rollback`, `init`: which version is served, changed by hand.

The server manager is asked, and answers once the repository says so too. Then the devices are watched
for a moment: those that are connected take the version over within seconds, the others when they return.
"""

import asyncio
import contextlib
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from fedbus.app.bus_session import connect_bus, latest_transitions, resolve_task, run_async, transition_of
from fedbus.app.cli.commands.model.repository import TaskId, parse_version
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import ShowStatus, progress_bar, status_line
from fedbus.app.terminal.startup_progress import shorten_names
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.champion import PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientEvent, InferenceEvent
from fedbus.contracts.message import Request
from fedbus.contracts.model import ModelRef

ANSWER_TIMEOUT_S: Final = 120.0
"""A first model may have to be built, and an S3 waited for."""
WATCH_S: Final = 10.0
WATCHED_KINDS: Final = ("client", "inference")

ReasonOption = Annotated[str, typer.Option(help="Why; everybody can read it.")]
WaitOption = Annotated[
    float, typer.Option("--wait", help="For how many seconds the devices are watched.", min=0, max=600)
]


def promote(
    version: Annotated[str, typer.Argument(help="A version's number, v3 or 3.")],
    *,
    task: TaskId = None,
    reason: ReasonOption = "promoted by hand",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """Serve a version from now on, whatever the gate said of it, or a device that went back from it."""
    number = parse_version(version, 0)
    _request_change(
        lambda name: PromoteModel(task=name, model_version=number, reason=reason), task, wait_s, json=json
    )


def rollback(
    *,
    to: Annotated[
        str, typer.Option(help="The version to go back to.", show_default="the champion before")
    ] = "",
    task: TaskId = None,
    reason: ReasonOption = "rolled back by hand",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """Serve the champion before this one again."""
    number = parse_version(to, 0) if to else None
    _request_change(lambda name: RollBackModel(task=name, to=number, reason=reason), task, wait_s, json=json)


def init(
    *,
    new_lineage: Annotated[
        bool,
        typer.Option(
            "--new-lineage", help="Build a first model anew, of whatever architecture the code has."
        ),
    ] = False,
    task: TaskId = None,
    reason: ReasonOption = "a new lineage was asked for",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """With --new-lineage: begin anew with a first model, of the code that everybody has; all versions stay."""
    if not new_lineage:
        raise CliError(
            "the server makes the first model of a task by itself; to have another first model built and served "
            "beside the versions that there are, say --new-lineage",
            ExitCode.USAGE,
        )
    _request_change(lambda name: StartLineage(task=name, reason=reason), task, wait_s, json=json)


def _request_change(request: Any, task: str | None, wait_s: float, *, json: bool) -> None:
    async def change() -> dict[str, Any]:
        async with connect_bus() as bus:
            question: Request = request(await resolve_task(bus, task))
            _, asked_at = await bus.sequence_range(lifecycle_stream(bus.fed))
            with progress_bar(f"asking the server of {question.task}"):
                answer = await bus.request(question, timeout_s=ANSWER_TIMEOUT_S)
            if not json:
                typer.echo(_describe_change(answer.model, answer.instead_of))
            with status_line(Console(stderr=True)) as tell:
                devices = await _watch_devices(bus, question.task, answer.model, asked_at, wait_s, tell)
            return {"model": answer.model.model_dump(), "instead_of": answer.instead_of, **devices}

    facts = run_async(change())
    if json:
        print_json(facts)
        return
    if facts["serving"]:
        typer.echo(f"serving it already: {', '.join(facts['serving'])}")
    for client, reason in facts["refused"].items():
        typer.echo(f"{client} does not take it: {reason}")
    if facts["not_yet"]:
        typer.echo(f"not yet, or away: {', '.join(facts['not_yet'])}; they take it over when they return")
    if not any(facts[word] for word in ("serving", "refused", "not_yet")):
        typer.echo("no device serves a model yet")


def _describe_change(model: ModelRef, instead_of: int | None) -> str:
    if instead_of == model.version:
        return f"version {model.version} is served already; a device that went back from it tries it again"
    return f"version {model.version} is served from now on" + (
        f", instead of version {instead_of}" if instead_of else ""
    )


async def _watch_devices(
    bus: Bus, task: str, model: ModelRef, asked_at: int, wait_s: float, tell: ShowStatus
) -> dict[str, Any]:
    """The devices that say within *wait_s* that they serve *model*, those that do not take it, and the others.

    *asked_at* is how long the log was when the model was asked for: what was refused before then was another one.
    *tell* hears how many do, each time that it is another number.
    """
    devices: dict[str, str | None] = {}
    known = sorted(
        await latest_transitions(bus, *WATCHED_KINDS, thing=f"*.{task}"), key=lambda seen: seen.sequence
    )
    for seen in known:
        _record_device(devices, seen, model, asked_at)
    if None in devices.values():
        wanted = [subjects.lifecycle(bus.fed, kind, f"*.{task}") for kind in WATCHED_KINDS]
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(wait_s),
                bus.watch(lifecycle_stream(bus.fed), wanted, after=known[-1].sequence) as stream,
            ):
                tell(_describe_progress(devices, model))
                async for seen in stream:
                    _record_device(devices, seen, model, asked_at)
                    if None not in devices.values():
                        break
                    tell(_describe_progress(devices, model))
    return {
        "serving": sorted(client for client, why_not in devices.items() if why_not == ""),
        "refused": {client: why_not for client, why_not in sorted(devices.items()) if why_not},
        "not_yet": sorted(client for client, why_not in devices.items() if why_not is None),
    }


def _describe_progress(devices: dict[str, str | None], model: ModelRef) -> str:
    """``2 of 3 devices serve version 4; waiting for c3``."""
    serve = sum(why_not == "" for why_not in devices.values())
    missing = sorted(client for client, why_not in devices.items() if why_not is None)
    return f"{serve} of {len(devices)} devices serve version {model.version}; waiting for {shorten_names(missing)}"


def _record_device(
    devices: dict[str, str | None], seen: StoredMessage, model: ModelRef, asked_at: int
) -> None:
    """What *seen* says of its device: that it serves *model* (no reason), why it does not, or nothing yet (None)."""
    keeps_the_old = (ClientEvent.INFER_REFUSED, InferenceEvent.LOAD_REFUSED, InferenceEvent.MODEL_RETURNED)
    move = transition_of(seen)
    client = move.thing.split(".")[0]
    if seen.sequence > asked_at and move.event in keeps_the_old:
        devices[client] = move.reason or "it gave no reason"
    elif move.kind == "inference":
        served = move.facts.model  # type: ignore[union-attr]
        serves = move.target == "serving" and served is not None and served.version == model.version
        devices[client] = "" if serves else devices.get(client) or None
