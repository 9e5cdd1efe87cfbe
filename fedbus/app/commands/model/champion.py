"""`fedbus model promote`, `rollback`, `init`: which version is served, changed by hand.

The server manager is asked, and answers once the repository says so too. Then the devices are watched
for a moment: those that are connected take the version over within seconds, the others when they return.
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app import show
from fedbus.app.commands.model.repository import TaskId, number_of
from fedbus.app.edge import Exit, Failure

if TYPE_CHECKING:
    from fedbus.bus.bus import Bus, Seen
    from fedbus.contracts.message import Request
    from fedbus.contracts.model import ModelRef

ANSWER_S: Final = 120.0
"""A first model may have to be built, and an S3 waited for."""
WATCHED_S: Final = 10.0

Reason = Annotated[str, typer.Option(help="Why; everybody can read it.")]
Wait = Annotated[
    float, typer.Option("--wait", help="For how many seconds the devices are watched.", min=0, max=600)
]


def promote(
    version: Annotated[str, typer.Argument(help="A version's number, v3 or 3.")],
    *,
    task: TaskId = None,
    reason: Reason = "promoted by hand",
    wait_s: Wait = WATCHED_S,
    json: show.AsJson = False,
) -> None:
    """Serve a version from now on, whatever the gate said of it."""
    from fedbus.contracts.versions import PromoteModel

    number = number_of(version, 0)
    _change(
        lambda name: PromoteModel(task=name, model_version=number, reason=reason), task, wait_s, json=json
    )


def rollback(
    *,
    to: Annotated[str, typer.Option(help="The version to go back to. [default: the champion before]")] = "",
    task: TaskId = None,
    reason: Reason = "rolled back by hand",
    wait_s: Wait = WATCHED_S,
    json: show.AsJson = False,
) -> None:
    """Serve the champion before this one again."""
    from fedbus.contracts.versions import RollBackModel

    number = number_of(to, 0) if to else None
    _change(lambda name: RollBackModel(task=name, to=number, reason=reason), task, wait_s, json=json)


def init(
    *,
    new_lineage: Annotated[
        bool,
        typer.Option(
            "--new-lineage", help="Build a first model anew, of whatever architecture the code has."
        ),
    ] = False,
    task: TaskId = None,
    reason: Reason = "a new lineage was asked for",
    wait_s: Wait = WATCHED_S,
    json: show.AsJson = False,
) -> None:
    """Begin anew with a first model; the versions that there are stay."""
    from fedbus.contracts.versions import StartLineage

    if not new_lineage:
        raise Failure(
            "the server makes the first model of a task by itself; to have another first model built and served "
            "beside the versions that there are, say --new-lineage",
            Exit.USAGE,
        )
    _change(lambda name: StartLineage(task=name, reason=reason), task, wait_s, json=json)


def _change(request: Any, task: str | None, wait_s: float, *, json: bool) -> None:
    from fedbus.app.session import now, on_the_bus, the_task

    async def change() -> dict[str, Any]:
        async with on_the_bus() as bus:
            question: Request = request(await the_task(bus, task))
            answer = await bus.request(question, timeout_s=ANSWER_S)
            if not json:
                typer.echo(_sentence(answer.model, answer.instead_of))
            return {
                "model": answer.model.model_dump(),
                "instead_of": answer.instead_of,
                **await _who_serves(bus, question.task, answer.model, wait_s),
            }

    facts = now(change())
    if json:
        show.as_json(facts)
        return
    if facts["serving"]:
        typer.echo(f"serving it already: {', '.join(facts['serving'])}")
    if facts["not_yet"]:
        typer.echo(f"not yet, or away: {', '.join(facts['not_yet'])}; they take it over when they return")
    if not facts["serving"] and not facts["not_yet"]:
        typer.echo("no device serves a model yet")


def _sentence(model: "ModelRef", instead_of: int | None) -> str:
    return f"version {model.version} is served from now on" + (
        f", instead of version {instead_of}" if instead_of else ""
    )


async def _who_serves(bus: "Bus", task: str, model: "ModelRef", wait_s: float) -> dict[str, list[str]]:
    """The devices that say within *wait_s* that they serve *model*, and those that do not."""
    from fedbus.app.session import lives, moved
    from fedbus.bus.streams import life_stream
    from fedbus.contracts import subjects

    mine = f"*.{task}"
    known = await lives(bus, "inference", thing=mine)
    serves: dict[str, bool] = {}

    def heard(seen: "Seen") -> bool:
        move = moved(seen)
        serves[move.thing.split(".")[0]] = _is_served(move, model)
        return all(serves.values())

    for seen in known:
        heard(seen)
    if not all(serves.values()):
        wanted, newest = [subjects.life(bus.fed, "inference", mine)], max(seen.sequence for seen in known)
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(wait_s),
                bus.watch(life_stream(bus.fed), wanted, after=newest) as stream,
            ):
                async for seen in stream:
                    if heard(seen):
                        break
    return {
        "serving": sorted(client for client, done in serves.items() if done),
        "not_yet": sorted(client for client, done in serves.items() if not done),
    }


def _is_served(move: Any, model: "ModelRef") -> bool:
    served = move.facts.model
    return move.target == "serving" and served is not None and served.version == model.version
