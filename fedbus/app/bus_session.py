"""A command's moment on the bus."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.telemetry import log_to_stderr
from fedbus.bus.bus import Bus, Identity, StoredMessage
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.credentials import parse_user
from fedbus.contracts.message import Message
from fedbus.contracts.permissions import SERVER_ROLES, Role
from fedbus.contracts.subjects import USERS
from fedbus.contracts.transition import Transition

CLI_AGENT: Final = "cli"
AGENT_BY_ROLE: Final[dict[str, str]] = {
    **{role: role for role in (*SERVER_ROLES, Role.GATEWAY)},
    Role.SERVER: Role.SERVER_MANAGER,
}
"""Of credentials for the server side: as which agent to look with them."""
CONNECT_TIMEOUT_S: Final = 5.0
UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* to its end; the library's warnings go to standard error."""
    log_to_stderr(level="ERROR")
    return asyncio.run(work)


@asynccontextmanager
async def connect_bus(settings: Settings | None = None) -> AsyncIterator[Bus]:
    """The bus that the settings name, as a person at a terminal sees it; raises BusUnreachable."""
    settings = settings or Settings.from_environment()
    await _check_reachable(settings.nats_url)
    async with Bus.connect(settings.nats_url, _identity(settings), access=settings.access) as bus:
        yield bus


def _identity(settings: Settings) -> Identity:
    """As whom we look: credentials that are not a person's are good for the inbox of their own agent alone."""
    if (role := _credentials_role(settings)) in AGENT_BY_ROLE:
        return Identity(settings.fed, AGENT_BY_ROLE[role])
    return Identity(settings.fed, CLI_AGENT, settings.client or USERS)


def _credentials_role(settings: Settings) -> str:
    """What the credentials are for, as far as they say so; what is wrong with them is told by the bus."""
    try:
        return parse_user(settings.creds.read_text()).role if settings.creds else ""
    except (OSError, ValueError):
        return ""


def can_discover_agents(settings: Settings) -> bool:
    """Whether our credentials let us ask all agents whether they are there, as those of people do."""
    return _credentials_role(settings) in ("", Role.USER, Role.OBSERVER, Role.GATEWAY)


async def _check_reachable(url: str) -> None:
    """A closed door is told at once: the bus itself keeps trying, as an agent must and a person need not."""
    at = urlsplit(url)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(at.hostname, at.port or 4222)
    except TimeoutError:
        raise BusUnreachable(url, f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise BusUnreachable(url, os.strerror(error.errno) if error.errno else error) from None
    writer.close()


async def latest_transitions(bus: Bus, *kinds: str, thing: str = ">") -> list[StoredMessage]:
    """The last transition of every thing of these *kinds*, in the order of their things."""
    wanted = [subjects.lifecycle(bus.fed, kind, thing) for kind in kinds]
    return sorted(
        await bus.last_per_subject(lifecycle_stream(bus.fed), wanted),
        key=lambda seen: _natural_key(seen.subject),
    )


async def latest_messages(
    bus: Bus, kind: type[Message], *, client: str = "*", task: str = "*"
) -> list[StoredMessage]:
    """What each client has said last of this *kind* in each task, as far as the event stream goes back."""
    subject = subjects.wildcard_for(bus.fed, kind, client=client, task=task)
    return await bus.last_per_subject(events_stream(bus.fed), [subject])


def transition_of(seen: StoredMessage) -> Transition:
    """The transition in *seen*: the life stream holds nothing else."""
    assert isinstance(seen.message, Transition)
    return seen.message


async def resolve_task(bus: Bus, asked: str | None) -> str:
    """The task that was *asked* for, or the only one there is."""
    known = [transition_of(seen).task for seen in await latest_transitions(bus, "server")]
    if asked is not None and asked in known:
        return asked
    if asked is None and len(known) == 1:
        return known[0]
    if not known:
        raise CliError(
            f"no task has a server in federation {bus.fed}: start one with fedbus up", ExitCode.NOT_FOUND
        )
    complaint = f"no task {asked} here" if asked else "several tasks are here"
    raise CliError(
        f"{complaint}: choose one of {', '.join(known)}", ExitCode.NOT_FOUND if asked else ExitCode.USAGE
    )


def parse_time(text: str) -> datetime:
    """A time as a person writes it: ``10m`` and ``2h`` ago, or ISO 8601."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text):
        return datetime.now(UTC) - timedelta(seconds=float(match[1]) * UNITS[match[2]])
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise CliError(
            f"{text!r} is not a time: write 90s, 10m, 2h, 1d or 2026-01-31T12:00", ExitCode.USAGE
        ) from None
    return when if when.tzinfo else when.astimezone()


def _natural_key(subject: str) -> list[tuple[int, str]]:
    """So that run 10 comes after run 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"[.-]", subject)]
