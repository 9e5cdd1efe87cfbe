"""`fedbus top`: the federation on one screen, as it moves; one picture of it where nobody can look for long."""

import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from fedbus.app.bus_session import connect_bus, run_async
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.top import TopScreen, client_record
from fedbus.app.terminal.top_screen import COLUMNS, ScreenOptions, run_cells, server_cells, visible_runs
from fedbus.app.views.federation_status import follow_view, load_view, sort_clients
from fedbus.bus.bus import Bus
from fedbus.domain.federation_view import FederationView


class Sort(StrEnum):
    """What clients can be sorted by: see `fedbus.app.views.federation_status.SORT_KEYS`."""

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
    json: output.JsonOption = False,
) -> None:
    """Watch servers, runs and clients, live: states, models, load, when last seen, why one does not train.

    q quits; n s t v c m h l w sort by name, state, training, model version, cpu, memory, heat, last seen, why;
    r turns the order; arrows and page keys scroll. Piped, or with --once, it prints one snapshot.
    """
    can_draw = sys.stdin.isatty() and sys.stdout.isatty() and not output.console().is_dumb_terminal

    async def look() -> None:
        async with connect_bus() as bus:
            if once or json or not can_draw:
                await _print_once(bus, sort, json=json)
            else:
                await _run_screen(bus, sort)

    run_async(look())


async def _run_screen(bus: Bus, sort: str) -> None:
    screen = TopScreen(Console(highlight=False), bus, ScreenOptions(sort=sort))
    async with follow_view(bus, screen.view, screen.on_message):
        await screen.run()


async def _print_once(bus: Bus, sort: str, *, json: bool) -> None:
    view = FederationView()
    await load_view(bus, view)
    if json:
        print_json([client_record(view, client) for client in sort_clients(view, sort)])
    else:
        _print_tables(view, sort)


def _print_tables(view: FederationView, sort: str) -> None:
    now = datetime.now(UTC)
    servers = [server_cells(server) for _, server in sorted(view.servers.items())]
    output.print_table(
        ("task", "server", "model", "code", ""), servers, empty="no server yet. Start one: fedbus up"
    )
    output.print_table(
        ("run", "state", "how it goes"), map(run_cells, visible_runs(view)), empty="no run yet"
    )
    output.print_table(
        [one.heading for one in COLUMNS],
        [[one.cell(view, client, now) for one in COLUMNS] for client in sort_clients(view, sort)],
        empty="no clients yet. Start one: fedbus client up c1",
    )
