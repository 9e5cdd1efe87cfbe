"""`fedbus model promote`, `rollback` and `init`: change the champion.

The server manager replies after the model repository has stored the change. Then the command waits some seconds for
the devices. Connected devices load the version within seconds, the others when they reconnect.
"""

import asyncio
import contextlib
from collections.abc import Callable
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
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.champion import ModelPromoted, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientEvent, InferenceData, InferenceEvent, InferenceState
from fedbus.contracts.message import Request
from fedbus.contracts.model import ModelRef

ANSWER_TIMEOUT_S: Final = 120.0
"""Long enough to build a first model, and to retry an S3 that does not respond."""
WATCH_S: Final = 10.0
WATCHED_KINDS: Final = ("client", "inference")

ReasonOption = Annotated[str, typer.Option(help="Reason, which all users can read.")]
WaitOption = Annotated[float, typer.Option("--wait", help="Seconds to wait for the devices.", min=0, max=600)]


def promote(
    version: Annotated[str, typer.Argument(help="A version: 3 or v3.")],
    *,
    task: TaskId = None,
    reason: ReasonOption = "promoted by hand",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """Promote a version even if the gate rejected it or a device rolled it back."""
    number = parse_version(version, 0)
    _request_change(
        lambda name: PromoteModel(task=name, model_version=number, reason=reason), task, wait_s, json=json
    )


def rollback(
    *,
    to: Annotated[
        str, typer.Option(help="The version to promote.", show_default="the previous champion")
    ] = "",
    task: TaskId = None,
    reason: ReasonOption = "rolled back by hand",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """Roll back to the previous champion."""
    number = parse_version(to, 0) if to else None
    _request_change(lambda name: RollBackModel(task=name, to=number, reason=reason), task, wait_s, json=json)


def init(
    *,
    new_lineage: Annotated[
        bool,
        typer.Option(
            "--new-lineage", help="Required: build a first model with the architecture of the deployed code."
        ),
    ] = False,
    task: TaskId = None,
    reason: ReasonOption = "new lineage requested",
    wait_s: WaitOption = WATCH_S,
    json: output.JsonOption = False,
) -> None:
    """With --new-lineage: build and promote a first model from the deployed code; all versions are kept."""
    if not new_lineage:
        raise CliError(
            "the server creates the first model of a task automatically. To build and promote another first model "
            "and keep the existing versions, use --new-lineage",
            ExitCode.USAGE,
        )
    _request_change(lambda name: StartLineage(task=name, reason=reason), task, wait_s, json=json)


def _request_change(
    request: Callable[[str], Request[ModelPromoted]], task: str | None, wait_s: float, *, json: bool
) -> None:
    async def change() -> dict[str, Any]:
        async with connect_bus() as bus:
            message = request(await resolve_task(bus, task))
            _, end_of_stream = await bus.sequence_range(lifecycle_stream(bus.fed))
            with progress_bar(f"waiting for the server of {message.task}"):
                reply = await bus.request(message, timeout_s=ANSWER_TIMEOUT_S)
            if not json:
                typer.echo(_describe_change(reply.model, reply.instead_of))
            with status_line(Console(stderr=True)) as show_status:
                devices = await _watch_devices(
                    bus, message.task, reply.model, end_of_stream, wait_s, show_status
                )
            return {"model": reply.model.model_dump(), "instead_of": reply.instead_of, **devices}

    facts = run_async(change())
    if json:
        print_json(facts)
        return
    if facts["serving"]:
        typer.echo(f"serving it: {', '.join(facts['serving'])}")
    for client, reason in facts["refused"].items():
        typer.echo(f"{client} rejected it: {reason}")
    if facts["not_yet"]:
        typer.echo(
            f"not serving it yet: {', '.join(facts['not_yet'])}; disconnected devices load it when they reconnect"
        )
    if not any(facts[key] for key in ("serving", "refused", "not_yet")):
        typer.echo("no device serves a model yet")


def _describe_change(model: ModelRef, instead_of: int | None) -> str:
    if instead_of == model.version:
        return f"version {model.version} is the champion already; devices that rolled it back load it again"
    return f"promoted version {model.version}" + (
        f"; the previous champion is version {instead_of}" if instead_of else ""
    )


async def _watch_devices(
    bus: Bus, task: str, model: ModelRef, end_of_stream: int, wait_s: float, show_status: ShowStatus
) -> dict[str, Any]:
    """Wait for at most *wait_s* until each device serves or rejects *model*; return the devices by answer.

    A rejection up to *end_of_stream*, a sequence number of the lifecycle stream, is about an earlier model.
    *show_status* gets a text each time that the number of devices changes.
    """
    devices: dict[str, str | None] = {}
    transitions = sorted(
        await latest_transitions(bus, *WATCHED_KINDS, key=f"*.{task}"), key=lambda stored: stored.sequence
    )
    for stored in transitions:
        _record_device(devices, stored, model, end_of_stream)
    if None in devices.values():
        wanted_subjects = [subjects.lifecycle(bus.fed, kind, f"*.{task}") for kind in WATCHED_KINDS]
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(wait_s),
                bus.read_stream(
                    lifecycle_stream(bus.fed), wanted_subjects, after=transitions[-1].sequence
                ) as stream,
            ):
                show_status(_describe_progress(devices, model))
                async for stored in stream:
                    _record_device(devices, stored, model, end_of_stream)
                    if None not in devices.values():
                        break
                    show_status(_describe_progress(devices, model))
    return {
        "serving": sorted(client for client, rejection in devices.items() if rejection == ""),
        "refused": {client: rejection for client, rejection in sorted(devices.items()) if rejection},
        "not_yet": sorted(client for client, rejection in devices.items() if rejection is None),
    }


def _describe_progress(devices: dict[str, str | None], model: ModelRef) -> str:
    """``2 of 3 devices serve version 4; waiting for c3``."""
    serve = sum(rejection == "" for rejection in devices.values())
    missing = sorted(client for client, rejection in devices.items() if rejection is None)
    return f"{serve} of {len(devices)} devices serve version {model.version}; waiting for {shorten_names(missing)}"


def _record_device(
    devices: dict[str, str | None], stored: StoredMessage, model: ModelRef, end_of_stream: int
) -> None:
    """Record the answer of a device: "" if it serves *model*, the reason of its rejection, or None."""
    rejections = (
        ClientEvent.INFER_REFUSED,
        ClientEvent.MODEL_NOT_SERVED,
        InferenceEvent.LOAD_REFUSED,
        InferenceEvent.MODEL_NOT_SERVED,
        InferenceEvent.MODEL_RETURNED,
    )
    transition = transition_of(stored)
    client = transition.key.split(".")[0]
    if stored.sequence > end_of_stream and transition.event in rejections:
        devices[client] = transition.reason or "no reason given"
    elif isinstance(transition.facts, InferenceData):
        served = transition.facts.model
        serves = (
            transition.target == InferenceState.SERVING
            and served is not None
            and served.version == model.version
        )
        devices[client] = "" if serves else devices.get(client) or None
