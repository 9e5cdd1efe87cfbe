"""`fedbus top`: servers, runs and clients on a live screen, or once as tables."""

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
    """The sort keys of clients: see `fedbus.app.views.federation_status.SORT_KEYS`."""

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
    sort: Annotated[Sort, typer.Option(help="Initial sort key of the clients.")] = Sort.NAME,
    once: Annotated[bool, typer.Option("--once", help="Print the current state once and exit.")] = False,
    json: output.JsonOption = False,
) -> None:
    """Show servers, runs and clients live: states, models, load, last report, and why a client does not train.

    q quits; n s t v c m h l w sort by name, state, training, model version, cpu, memory, heat, last report, why;
    r reverses the order; arrow and page keys scroll. In a pipe, or with --once, it prints the state once.
    """
    can_draw = sys.stdin.isatty() and sys.stdout.isatty() and not output.console().is_dumb_terminal

    async def show() -> None:
        async with connect_bus() as bus:
            if once or json or not can_draw:
                await _print_once(bus, sort, json=json)
            else:
                await _run_screen(bus, sort)

    run_async(show())


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
    output.print_table(("run", "state", "progress"), map(run_cells, visible_runs(view)), empty="no runs yet")
    output.print_table(
        [one.heading for one in COLUMNS],
        [[one.cell(view, client, now) for one in COLUMNS] for client in sort_clients(view, sort)],
        empty="no clients yet. Start one: fedbus client up c1",
    )
