"""`fedbus top`: the federation on one screen, as it moves; one picture of it where nobody can look for long."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.app.views.federation_status import Overview
    from fedbus.bus.bus import Bus


class Sort(StrEnum):
    """What clients can be sorted by: see `fedbus.app.views.federation_status.SORTS`."""

    NAME = "name"
    STATE = "state"
    TRAINING = "training"
    MODEL = "model"
    CPU = "cpu"
    MEMORY = "memory"
    HEAT = "heat"
    SEEN = "seen"
    WHY = "why"


def top(
    *,
    sort: Annotated[Sort, typer.Option(help="What clients are sorted by, to begin with.")] = Sort.NAME,
    once: Annotated[bool, typer.Option("--once", help="Show it once, all of it, and leave.")] = False,
    json: output.AsJson = False,
) -> None:
    """Watch servers, runs and clients, live: states, models, load, when last seen, why one does not train.

    q quits; n s t v c m h l w sort by name, state, training, model version, cpu, memory, heat, last seen, why;
    r turns the order; arrows and page keys scroll. Piped, or with --once, it is told once.
    """
    from fedbus.app.bus_session import now, on_the_bus

    can_draw = sys.stdin.isatty() and sys.stdout.isatty() and not output.console().is_dumb_terminal

    async def look() -> None:
        async with on_the_bus() as bus:
            if once or json or not can_draw:
                await _told_once(bus, sort, json=json)
            else:
                await _live(bus, sort)

    now(look())


async def _live(bus: "Bus", sort: str) -> None:
    from rich.console import Console

    from fedbus.app.terminal.top import Screen, followed
    from fedbus.app.terminal.top_screen import Look

    screen = Screen(Console(highlight=False), bus, Look(sort=sort))
    async with followed(bus, screen.overview, screen.moved):
        await screen.run()


async def _told_once(bus: "Bus", sort: str, *, json: bool) -> None:
    from fedbus.app.terminal.top import record, take_in
    from fedbus.app.views.federation_status import Overview

    overview = Overview()
    await take_in(bus, overview)
    if json:
        output.as_json([record(overview, one) for one in overview.sorted(sort)])
    else:
        _print(overview, sort)


def _print(overview: "Overview", sort: str) -> None:
    from datetime import UTC, datetime

    from fedbus.app.terminal.top_screen import COLUMNS, run_cells, runs_shown, server_cells

    now = datetime.now(UTC)
    servers = [server_cells(move) for _, move in sorted(overview.servers.items())]
    output.table(
        ("task", "server", "model", "code", ""), servers, empty="no server yet. Start one: fedbus up"
    )
    output.table(("run", "state", "how it goes"), map(run_cells, runs_shown(overview)), empty="no run yet")
    output.table(
        [one.heading for one in COLUMNS],
        [[one.of(overview, member, now) for one in COLUMNS] for member in overview.sorted(sort)],
        empty="no clients yet. Start one: fedbus client up c1",
    )
