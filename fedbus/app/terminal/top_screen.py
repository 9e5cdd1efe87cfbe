"""The screen of `fedbus top`: a `FederationView` drawn to the size of the terminal.

    fedbus top  dev                       3 clients · 2 train · 41.2 messages/s · 14:03:22
    mnist   training   v3 93c1a2f0   code 3a1f6c0d9be2
    mnist-3 running    ━━━━━━━━╸━━━━━━━ 2/4  loss 0.2931  accuracy 91.40%
    client     state      training model  cpu  mem seen why it does not train
    ...
    q quit · sort n s t v c m h l w · r reverse · ↑ ↓ scroll                    1–14 of 1000

Only the visible rows are drawn, so that a thousand clients cost no more than twenty. The width decides which columns
there are. Text that a device sends may contain anything; only its printable characters reach the terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedbus.app.terminal.output import STATE_STYLES
from fedbus.app.terminal.plain import pluralize, printable
from fedbus.app.views.federation_status import device_usage, natural_key, sort_clients
from fedbus.contracts.client import ClientState
from fedbus.contracts.run import RunData, RunState
from fedbus.contracts.server import ServerData
from fedbus.domain.federation_view import ClientView, EntityState, FederationView
from fedbus.domain.run_participation import short_version

STALE_S: Final = 60.0
"""A client that was not seen for longer is marked; its device reports four times a minute."""
BAR_WIDTH: Final = 12
MAX_TASKS: Final = 4
"""The servers and the runs that are shown; the clients have the rest of the screen."""
NARROW_WIDTH: Final = 76
MIDDLE_WIDTH: Final = 100
WIDE_WIDTH: Final = 130

SORT_BY_KEY: Final = {
    "n": "name",
    "s": "state",
    "t": "training",
    "v": "model",
    "c": "cpu",
    "m": "memory",
    "h": "heat",
    "l": "seen",
    "w": "why",
}
"""The sort order that each key selects."""


@dataclass(frozen=True)
class ClientColumn:
    """A column of the client table."""

    heading: str
    width: int
    """Characters; 0: what the others leave."""
    cell: Callable[[FederationView, ClientView, datetime], Text]
    sort: str = ""
    """The sort order that marks this column."""
    from_width: int = 0
    """The narrowest terminal that shows it."""
    is_right_aligned: bool = False


@dataclass
class ScreenOptions:
    """What the user chose, and whether the bus is connected."""

    sort: str = "name"
    reverse: bool = False
    first: int = 0
    """The index of the first visible client."""
    is_connected: bool = True


def render_screen(
    view: FederationView,
    options: ScreenOptions,
    now: datetime,
    *,
    width: int,
    height: int,
    fed: str = "",
    rate: float = 0.0,
) -> RenderableType:
    """Draw one screen; move ``options.first`` into the range of the clients."""
    header: list[RenderableType] = [_render_headline(view, options, now, fed=fed, rate=rate, width=width)]
    header += [_render_server(server) for _, server in sorted(view.servers.items())[:MAX_TASKS]]
    header += [_render_run(run, width) for run in visible_runs(view)]
    header.append(Text(""))
    rows = max(1, height - len(header) - 2)
    clients = sort_clients(view, options.sort, reverse=options.reverse)
    options.first = max(0, min(options.first, len(clients) - rows))
    visible = clients[options.first : options.first + rows]
    blank = [Text("")] * (rows - len(visible))
    return Group(
        *header,
        render_clients(view, visible, options, now, width=width),
        *blank,
        _render_footer(options, len(visible), len(clients), width),
    )


def render_clients(
    view: FederationView,
    clients: list[ClientView],
    options: ScreenOptions,
    now: datetime,
    *,
    width: int,
) -> Table:
    """Draw *clients* as a table that fits *width*."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=True, header_style="bold reverse", width=width
    )
    has_several_tasks = len({task for _, task in view.clients}) > 1
    columns = [
        one for one in COLUMNS if width >= one.from_width or (one.heading == "task" and has_several_tasks)
    ]
    for one in columns:
        arrow = ("▲" if options.reverse else "▼") if one.sort == options.sort else ""
        table.add_column(
            f"{one.heading}{arrow}",
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if one.is_right_aligned else "left",
            width=one.width or None,
            ratio=None if one.width else 1,
        )
    for client in clients:
        table.add_row(*(one.cell(view, client, now) for one in columns))
    return table


# --- the lines above ------------------------------------------------------------------------------


def _render_headline(
    view: FederationView, options: ScreenOptions, now: datetime, *, fed: str, rate: float, width: int
) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True, overflow="ellipsis")
    problem = "" if options.is_connected else "  disconnected"
    name = Text.assemble(("fedbus top", "bold"), f"  {fed}", (problem, "bold red"))
    count = len({client for client, _ in view.clients})
    figures = [pluralize(count, "client"), f"{view.training_count} train", f"{now.astimezone():%H:%M:%S}"]
    full = [*figures[:2], f"{rate:.1f} messages/s", figures[2]]
    candidates = (" · ".join(one) for one in (full, figures, figures[:2]))
    line.add_row(name, next((one for one in candidates if len(name) + 2 + len(one) <= width), ""))
    return line


def _render_server(server: EntityState[ServerData]) -> RenderableType:
    task, state, model, code, reason = server_cells(server)
    line = Text.assemble(Text(f"{task:<10} ", style="bold"), state, " " * max(1, 12 - len(state)))
    return _truncate(line.append(f"{model:<12}  {f'code {code}  ' if code else ''}{reason}"))


def server_cells(server: EntityState[ServerData]) -> tuple[str, Text, str, str, str]:
    """Return a server's task, state, model and code, and the reason of its state or what it waits for."""
    data, waits_for = server.data, server.transition.waits_for
    model = f"v{data.model.version} {data.model.sha256[:8]}" if data.model else "no model yet"
    reason = server.reason or (f"waits for {waits_for}" if waits_for else "")
    if data.trouble:  # it lasts through other transitions until the store has recovered
        problem = f"model repository {data.trouble}"
        reason = f"{problem}: {reason}" if reason else problem
    code = short_version(data.code_version) if data.code_version else ""
    return data.task, state_text(server.state), model, code, printable(reason)


def visible_runs(view: FederationView) -> list[EntityState[RunData]]:
    """Return the active runs; if there is none, the last run, which shows how it ended."""
    active = sorted(view.active_runs, key=lambda run: natural_key(run.data.run))
    return active[-MAX_TASKS:] or ([view.latest_run] if view.latest_run else [])


def _render_run(run: EntityState[RunData], width: int) -> RenderableType:
    name, state, progress = run_cells(run)
    start = Text.assemble(Text(f"{name:<10} ", style="bold"), state, " " * max(1, 12 - len(state)))
    bar_width = BAR_WIDTH if width < MIDDLE_WIDTH else 2 * BAR_WIDTH
    done = rounds_done(run.data)
    is_finished = run.state == RunState.FINISHED
    bar = render_bar(done, run.data.plan.total_rounds_after(done, is_finished=is_finished), bar_width)
    return _truncate(Text.assemble(start, bar, f" {progress}"))


def render_bar(done: int, total: int, width: int) -> Text:
    """Draw a progress bar that can be read without colours; it stays empty if *total* is 0, which is not known."""
    full = min(width, width * done // total) if total else 0
    return Text.assemble(("━" * full, "cyan"), ("╌" * (width - full), "dim"))


def run_cells(run: EntityState[RunData]) -> tuple[str, Text, str]:
    """Return a run's name, state and progress: ``2/4  loss 0.2931  accuracy 91.40%  3 clients``.

    The progress begins with ``round 2`` if only the app knows the number of rounds.
    """
    data = run.data
    last = data.rounds[-1] if data.rounds else None
    done = rounds_done(data)
    total = data.plan.total_rounds_after(done, is_finished=run.state == RunState.FINISHED)
    parts = [f"{done}/{total}" if total else f"round {done}"]
    if last and last.loss is not None:
        parts.append(f"loss {last.loss:.4f}")
    if last and last.accuracy is not None:
        parts.append(f"accuracy {last.accuracy:.2%}")
    if data.cohort:
        parts.append(pluralize(len(data.cohort), "client"))
    parts.append(printable(run.reason))
    return data.run, state_text(run.state), "  ".join(filter(None, parts))


def rounds_done(data: RunData) -> int:
    return max((one.round for one in data.rounds), default=0)


def _render_footer(options: ScreenOptions, shown: int, total: int, width: int) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    position = f"{options.first + 1}–{options.first + shown} of {total}" if shown else "no clients yet"
    hints = " · r reverse · ↑ ↓ scroll" if width >= NARROW_WIDTH else " · r · ↑ ↓"
    line.add_row(Text.assemble("q quit · sort ", *_sort_hints(options, width), hints), position)
    return line


def _sort_hints(options: ScreenOptions, width: int) -> list[Text]:
    """Return the keys that sort; on a wide terminal with what they sort by."""
    names = {key: f"{key} {name}" if width >= WIDE_WIDTH else key for key, name in SORT_BY_KEY.items()}
    hints = [
        Text(names[key], style="reverse" if name == options.sort else "") for key, name in SORT_BY_KEY.items()
    ]
    return [part for hint in hints for part in (hint, Text(" "))][:-1]


# --- the cells --------------------------------------------------------------------------------------


def state_text(name: str) -> Text:
    return Text(name, style=STATE_STYLES.get(name, ""))


def _truncate(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _usage_cell(view: FederationView, client: ClientView, field: str) -> Text:
    share = device_usage(view, client, field)
    return (
        Text("–", style="dim") if share is None else Text(f"{share:.0%}", style="red" if share > 0.9 else "")
    )


def _temperature_cell(view: FederationView, client: ClientView) -> Text:
    degrees = device_usage(view, client, "temperature_c")
    if degrees is None:
        return Text("–", style="dim")
    return Text(f"{degrees:.0f}°", style="red" if degrees > 80 else "")


def _last_seen_cell(view: FederationView, client: ClientView, now: datetime) -> Text:
    last_seen = view.presence.last_seen.get(client.client)
    if last_seen is None:
        return Text("–", style="dim")
    seconds = max(0.0, (now - last_seen).total_seconds())
    return Text(format_short_duration(seconds), style="bold yellow" if seconds > STALE_S else "")


def format_short_duration(seconds: float) -> str:
    """Format a duration with one unit: ``3s``, ``5m``, ``2h``, ``4d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _reason_cell(view: FederationView, client: ClientView) -> Text:
    is_waiting = client.refusal is None and client.state == ClientState.SERVING
    return Text(printable(view.not_training_reason(client)), style="dim" if is_waiting else "yellow")


def _predicts_cell(client: ClientView) -> Text:
    if client.not_served and client.served_model is None:
        return Text("no", style="dim")
    return state_text(client.inference_state)


def _version_cell(client: ClientView) -> Text:
    return Text(f"v{client.model_version}" if client.model_version else "–")


COLUMNS: Final = (
    ClientColumn("client", 12, lambda _, client, __: Text(client.client, style="bold"), "name"),
    ClientColumn("task", 10, lambda _, client, __: Text(client.task), from_width=WIDE_WIDTH),
    ClientColumn("state", 10, lambda _, client, __: state_text(client.state), "state"),
    ClientColumn("training", 9, lambda _, client, __: state_text(client.training_state), "training"),
    ClientColumn("predicts", 8, lambda _, client, __: _predicts_cell(client), from_width=MIDDLE_WIDTH),
    ClientColumn("model", 6, lambda _, client, __: _version_cell(client), "model"),
    ClientColumn(
        "code", 12, lambda _, client, __: Text(short_version(client.code_version)), from_width=WIDE_WIDTH
    ),
    ClientColumn(
        "cpu", 4, lambda view, client, _: _usage_cell(view, client, "cpu"), "cpu", is_right_aligned=True
    ),
    ClientColumn(
        "mem", 4, lambda view, client, _: _usage_cell(view, client, "memory"), "memory", is_right_aligned=True
    ),
    ClientColumn(
        "heat",
        5,
        lambda view, client, _: _temperature_cell(view, client),
        "heat",
        from_width=MIDDLE_WIDTH,
        is_right_aligned=True,
    ),
    ClientColumn("seen", 5, _last_seen_cell, "seen", is_right_aligned=True),
    ClientColumn("why it does not train", 0, lambda view, client, _: _reason_cell(view, client), "why"),
)
