"""A command's moment on the bus."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from fedbus.app.failures import Exit, Failure
from fedbus.app.settings import Settings
from fedbus.app.telemetry import log_to_stderr
from fedbus.bus.bus import Bus, Identity, Seen
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.streams import events_stream, life_stream
from fedbus.contracts import subjects
from fedbus.contracts.credentials import user_in
from fedbus.contracts.message import Message
from fedbus.contracts.permissions import OF_THE_SERVER, Role
from fedbus.contracts.subjects import PEOPLE
from fedbus.contracts.transition import Transition

AGENT: Final = "cli"
OF_AGENTS: Final[dict[str, str]] = {
    **{role: role for role in (*OF_THE_SERVER, Role.GATEWAY)},
    Role.SERVER: Role.SERVER_MANAGER,
}
"""Of credentials for the server side: as which agent to look with them."""
KNOCK_S: Final = 5.0
UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

T = TypeVar("T")


def now(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* to its end; the library's warnings go to standard error."""
    log_to_stderr(level="ERROR")
    return asyncio.run(work)


@asynccontextmanager
async def on_the_bus(settings: Settings | None = None) -> AsyncIterator[Bus]:
    """The bus that the settings name, as a person at a terminal sees it; raises BusUnreachable."""
    settings = settings or Settings.from_environment()
    await _knock(settings.nats_url)
    async with Bus.connect(settings.nats_url, _who(settings), access=settings.access) as bus:
        yield bus


def _who(settings: Settings) -> Identity:
    """As whom we look: credentials that are not a person's are good for the inbox of their own agent alone."""
    if (role := _role(settings)) in OF_AGENTS:
        return Identity(settings.fed, OF_AGENTS[role])
    return Identity(settings.fed, AGENT, settings.client or PEOPLE)


def _role(settings: Settings) -> str:
    """What the credentials are for, as far as they say so; what is wrong with them is told by the bus."""
    try:
        return user_in(settings.creds.read_text()).role if settings.creds else ""
    except (OSError, ValueError):
        return ""


def may_ask_agents(settings: Settings) -> bool:
    """Whether our credentials let us ask all agents whether they are there, as those of people do."""
    return _role(settings) in ("", Role.USER, Role.OBSERVER, Role.GATEWAY)


async def _knock(url: str) -> None:
    """A closed door is told at once: the bus itself keeps trying, as an agent must and a person need not."""
    at = urlsplit(url)
    try:
        async with asyncio.timeout(KNOCK_S):
            _, writer = await asyncio.open_connection(at.hostname, at.port or 4222)
    except TimeoutError:
        raise BusUnreachable(url, f"no answer within {KNOCK_S:g} s") from None
    except OSError as error:
        raise BusUnreachable(url, os.strerror(error.errno) if error.errno else error) from None
    writer.close()


async def lives(bus: Bus, *kinds: str, thing: str = ">") -> list[Seen]:
    """The last transition of every thing of these *kinds*, in the order of their things."""
    wanted = [subjects.life(bus.fed, kind, thing) for kind in kinds]
    return sorted(await bus.snapshot(life_stream(bus.fed), wanted), key=lambda seen: _by_number(seen.subject))


async def last_said(bus: Bus, kind: type[Message], *, client: str = "*", task: str = "*") -> list[Seen]:
    """What each client has said last of this *kind* in each task, as far as the event stream goes back."""
    subject = subjects.every(bus.fed, kind, client=client, task=task)
    return await bus.snapshot(events_stream(bus.fed), [subject])


def moved(seen: Seen) -> Transition:
    """The transition in *seen*: the life stream holds nothing else."""
    assert isinstance(seen.message, Transition)
    return seen.message


async def the_task(bus: Bus, asked: str | None) -> str:
    """The task that was *asked* for, or the only one there is."""
    known = [moved(seen).task for seen in await lives(bus, "server")]
    if asked is not None and asked in known:
        return asked
    if asked is None and len(known) == 1:
        return known[0]
    if not known:
        raise Failure(
            f"no task has a server in federation {bus.fed}: start one with fedbus up", Exit.NOT_FOUND
        )
    complaint = f"no task {asked} here" if asked else "several tasks are here"
    raise Failure(f"{complaint}: choose one of {', '.join(known)}", Exit.NOT_FOUND if asked else Exit.USAGE)


def moment(text: str) -> datetime:
    """A time as a person writes it: ``10m`` and ``2h`` ago, or ISO 8601."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text):
        return datetime.now(UTC) - timedelta(seconds=float(match[1]) * UNITS[match[2]])
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise Failure(
            f"{text!r} is not a time: write 90s, 10m, 2h, 1d or 2026-01-31T12:00", Exit.USAGE
        ) from None
    return when if when.tzinfo else when.astimezone()


def _by_number(subject: str) -> list[tuple[int, str]]:
    """So that run 10 comes after run 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"[.-]", subject)]
