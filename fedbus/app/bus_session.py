"""How a command connects to the bus, and common reads from it."""

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
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.credentials import parse_user
from fedbus.contracts.message import Message
from fedbus.contracts.permissions import SERVER_ROLES, Role
from fedbus.contracts.server import SERVER
from fedbus.contracts.subjects import USERS
from fedbus.contracts.transition import Transition

CLI_AGENT: Final = "cli"
AGENT_BY_ROLE: Final[dict[str, str]] = {
    **{role: role for role in (*SERVER_ROLES, Role.GATEWAY)},
    Role.SERVER: Role.SERVER_MANAGER,
}
"""The agent that a command connects as with the credentials of each server-side role."""
CONNECT_TIMEOUT_S: Final = 5.0
UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run *work*; errors of the library are logged to standard error."""
    log_to_stderr(level="ERROR")
    return asyncio.run(work)


@asynccontextmanager
async def connect_bus(settings: Settings | None = None) -> AsyncIterator[Bus]:
    """Connect to the bus of the settings, as a user.

    Raises:
        BusUnreachable: Nats-server does not accept the connection.

    """
    settings = settings or Settings.from_environment()
    await _check_reachable(settings.nats_url)
    async with Bus.connect(settings.nats_url, _identity(settings), access=settings.access) as bus:
        yield bus


def _identity(settings: Settings) -> Identity:
    """Choose the identity for the credentials: those of an agent may only use the inbox of that agent."""
    if (role := _credentials_role(settings)) in AGENT_BY_ROLE:
        return Identity(settings.fed, AGENT_BY_ROLE[role])
    return Identity(settings.fed, CLI_AGENT, settings.client or USERS)


def _credentials_role(settings: Settings) -> str:
    """Return the role in the credentials, or an empty string. `Bus.connect` reports invalid credentials."""
    try:
        return parse_user(settings.creds.read_text()).role if settings.creds else ""
    except (OSError, ValueError):
        return ""


def can_discover_agents(settings: Settings) -> bool:
    """Return whether the credentials permit service discovery (``$SRV``), as those of users do."""
    return _credentials_role(settings) in ("", Role.USER, Role.OBSERVER, Role.GATEWAY)


async def _check_reachable(url: str) -> None:
    """Fail at once if no server listens on *url*; `Bus.connect` itself retries, for agents."""
    address = urlsplit(url)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(address.hostname, address.port or 4222)
    except TimeoutError:
        raise BusUnreachable(url, f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise BusUnreachable(url, os.strerror(error.errno) if error.errno else error) from None
    writer.close()


async def latest_transitions(bus: Bus, *kinds: str, key: str = ">") -> list[StoredMessage]:
    """Return the last transition of every entity of these *kinds*, in the natural order of their keys."""
    wanted = [subjects.lifecycle(bus.fed, kind, key) for kind in kinds]
    return sorted(
        await bus.last_per_subject(lifecycle_stream(bus.fed), wanted),
        key=lambda stored: _natural_key(stored.subject),
    )


async def latest_messages(
    bus: Bus, kind: type[Message], *, client: str = "*", task: str = "*"
) -> list[StoredMessage]:
    """Return the last message of this *kind* from each client in each task that the event stream still has."""
    subject = subjects.wildcard_for(bus.fed, kind, client=client, task=task)
    return await bus.last_per_subject(events_stream(bus.fed), [subject])


def transition_of(stored: StoredMessage) -> Transition:
    """Return the transition in *stored*, a message of the lifecycle stream."""
    assert isinstance(stored.message, Transition)
    return stored.message


async def resolve_task(bus: Bus, name: str | None) -> str:
    """Return the task *name*, or without a name the only task of the federation.

    Raises:
        CliError: There is no such task, or several and no *name*.

    """
    tasks = [transition_of(stored).task for stored in await latest_transitions(bus, SERVER.kind)]
    if name is not None and name in tasks:
        return name
    if name is None and len(tasks) == 1:
        return tasks[0]
    if not tasks:
        raise CliError(
            f"federation {bus.fed} has no task yet. Start one with fedbus up, or wait until it has started",
            ExitCode.NOT_FOUND,
        )
    problem = (
        f"federation {bus.fed} has no task {name}" if name else f"federation {bus.fed} has several tasks"
    )
    raise CliError(
        f"{problem}. Choose one of: {', '.join(tasks)}", ExitCode.NOT_FOUND if name else ExitCode.USAGE
    )


def parse_time(text: str) -> datetime:
    """Parse ``10m`` or ``2h``, a time ago, or ISO 8601.

    Raises:
        CliError: *text* is neither.

    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text):
        return datetime.now(UTC) - timedelta(seconds=float(match[1]) * UNITS[match[2]])
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise CliError(
            f"{text!r} is not a time. Use for example 90s, 10m, 2h, 1d or 2026-01-31T12:00", ExitCode.USAGE
        ) from None
    return when if when.tzinfo else when.astimezone()


def _natural_key(subject: str) -> list[tuple[int, str]]:
    """Return a sort key by which run 10 comes after run 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"[.-]", subject)]
