"""What `fedbus top` shows: one screen drawn from an `Overview`, as wide and as high as the terminal.

    fedbus top  dev                       3 clients · 2 train · 41.2 messages/s · 14:03:22
    mnist   training   v3 93c1a2f0   code 3a1f6c0d9be2
    mnist-3 running    ━━━━━━━━╸━━━━━━━ 2/4  loss 0.2931  accuracy 91.40%
    client     state      training model  cpu  mem seen why it does not train
    ...
    q quit · sort n s t v c m h l w · r reverse · ↑ ↓ scroll                    1–14 of 1000

Only the rows that are seen are drawn, so a thousand clients cost no more than twenty. Which columns there are
depends on the width. What devices say may be anything: nothing of it reaches the terminal but what can be printed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedbus.app.terminal.output import STATE_STYLES, printable
from fedbus.app.views.federation_status import ClientStatus, FederationOverview
from fedbus.contracts.run import RunData
from fedbus.contracts.server import ServerData
from fedbus.contracts.transition import Transition
from fedbus.domain.run_participation import short_version

STALE_S: Final = 60.0
"""A client that was not heard of for so long is marked: its device tells of itself four times a minute."""
BAR_WIDTH: Final = 12
MAX_TASKS: Final = 4
"""So many servers and so many runs are shown, that clients have the rest of the screen."""
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
"""The key that sorts by each."""


@dataclass(frozen=True)
class ClientColumn:
    """A column: its heading, how wide at the most, and from which width of the terminal on."""

    heading: str
    width: int
    of: Callable[[FederationOverview, ClientStatus, datetime], Text]
    sort: str = ""
    from_width: int = 0
    right: bool = False


@dataclass
class ScreenOptions:
    """How somebody looks at it."""

    sort: str = "name"
    reverse: bool = False
    first: int = 0
    """The row at the top."""
    bus_is_there: bool = True


def render_screen(
    overview: FederationOverview,
    look: ScreenOptions,
    now: datetime,
    *,
    width: int,
    height: int,
    fed: str = "",
    rate: float = 0.0,
) -> RenderableType:
    """One screen; moves ``look.first`` to where there are rows."""
    top: list[RenderableType] = [_render_headline(overview, look, now, fed=fed, rate=rate, width=width)]
    top += [_render_server(move) for _, move in sorted(overview.servers.items())[:MAX_TASKS]]
    top += [_render_run(move, width) for move in visible_runs(overview)]
    top.append(Text(""))
    rows = max(1, height - len(top) - 2)
    members = overview.sorted(look.sort, reverse=look.reverse)
    look.first = max(0, min(look.first, len(members) - rows))
    seen = members[look.first : look.first + rows]
    blank = [Text("")] * (rows - len(seen))
    return Group(
        *top,
        render_clients(overview, seen, look, now, width=width),
        *blank,
        _render_footer(look, len(seen), len(members), width),
    )


def render_clients(
    overview: FederationOverview,
    members: list[ClientStatus],
    look: ScreenOptions,
    now: datetime,
    *,
    width: int,
) -> Table:
    """*members* as a table that fits *width*."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=True, header_style="bold reverse", width=width
    )
    several = len({one.task for one in overview.members.values()}) > 1
    columns = [one for one in COLUMNS if width >= one.from_width or (one.heading == "task" and several)]
    for one in columns:
        arrow = ("▲" if look.reverse else "▼") if one.sort == look.sort else ""
        table.add_column(
            f"{one.heading}{arrow}",
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if one.right else "left",
            width=one.width or None,
            ratio=None if one.width else 1,
        )
    for member in members:
        table.add_row(*(one.of(overview, member, now) for one in columns))
    return table


# --- the lines above ------------------------------------------------------------------------------


def _render_headline(
    overview: FederationOverview, look: ScreenOptions, now: datetime, *, fed: str, rate: float, width: int
) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True, overflow="ellipsis")
    away = "" if look.bus_is_there else "  the bus is away"
    name = Text.assemble(("fedbus top", "bold"), f"  {fed}", (away, "bold red"))
    devices = len({one.client for one in overview.members.values()})
    figures = [pluralize(devices, "client"), f"{overview.training} train", f"{now.astimezone():%H:%M:%S}"]
    full = [*figures[:2], f"{rate:.1f} messages/s", figures[2]]
    several = (" · ".join(one) for one in (full, figures, figures[:2]))
    line.add_row(name, next((one for one in several if len(name) + 2 + len(one) <= width), ""))
    return line


def _render_server(move: Transition) -> RenderableType:
    task, state_of_it, model, code, why = server_cells(move)
    line = Text.assemble(Text(f"{task:<10} ", style="bold"), state_of_it, " " * max(1, 12 - len(state_of_it)))
    return _truncate(line.append(f"{model:<12}  {f'code {code}  ' if code else ''}{why}"))


def server_cells(move: Transition) -> tuple[str, Text, str, str, str]:
    """A server: its task, state, model, code, and why it is so or what it waits for."""
    facts = move.facts
    assert isinstance(facts, ServerData)
    model = f"v{facts.model.version} {facts.model.sha256[:8]}" if facts.model else "no model yet"
    why = move.reason or (f"waits for {move.waits_for}" if move.waits_for else "")
    if facts.trouble:  # stands until it is over, whatever else moves the server meanwhile
        why = f"model repository {facts.trouble}: {why}" if why else f"model repository {facts.trouble}"
    code = short_version(facts.code_version) if facts.code_version else ""
    return move.task, state_text(move.target), model, code, printable(why)


def visible_runs(overview: FederationOverview) -> list[Transition]:
    """Those under way; where there is none, the last one, which tells how it ended."""
    last = overview.last_run
    return overview.under_way[-MAX_TASKS:] or ([last] if last else [])


def _render_run(move: Transition, width: int) -> RenderableType:
    facts = move.facts
    assert isinstance(facts, RunData)
    run, state_of_it, how_it_goes = run_cells(move)
    begin = Text.assemble(Text(f"{run:<10} ", style="bold"), state_of_it, " " * max(1, 12 - len(state_of_it)))
    done = render_bar(
        rounds_done(facts), facts.plan.rounds, BAR_WIDTH if width < MIDDLE_WIDTH else 2 * BAR_WIDTH
    )
    return _truncate(Text.assemble(begin, done, f" {how_it_goes}"))


def render_bar(done: int, of: int, width: int) -> Text:
    """How far something is, to be seen without colours too."""
    full = min(width, width * done // max(1, of))
    return Text.assemble(("━" * full, "cyan"), ("╌" * (width - full), "dim"))


def run_cells(move: Transition) -> tuple[str, Text, str]:
    """A run: its name, its state, and how it goes: ``2/4  loss 0.2931  accuracy 91.40%  3 clients``."""
    facts = move.facts
    assert isinstance(facts, RunData)
    last = facts.rounds[-1] if facts.rounds else None
    parts = [f"{rounds_done(facts)}/{facts.plan.rounds}"]
    if last and last.loss is not None:
        parts.append(f"loss {last.loss:.4f}")
    if last and last.accuracy is not None:
        parts.append(f"accuracy {last.accuracy:.2%}")
    if facts.cohort:
        parts.append(pluralize(len(facts.cohort), "client"))
    parts.append(printable(move.reason))
    return facts.run, state_text(move.target), "  ".join(filter(None, parts))


def rounds_done(facts: RunData) -> int:
    return max((one.round for one in facts.rounds), default=0)


def _render_footer(look: ScreenOptions, shown: int, there_are: int, width: int) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    where = f"{look.first + 1}–{look.first + shown} of {there_are}" if shown else "no clients yet"
    more = " · r reverse · ↑ ↓ scroll" if width >= NARROW_WIDTH else " · r · ↑ ↓"
    line.add_row(Text.assemble("q quit · sort ", *_sort_hints(look, width), more), where)
    return line


def _sort_hints(look: ScreenOptions, width: int) -> list[Text]:
    """The keys that sort, and where there is room what they sort by."""
    names = {key: f"{key} {name}" if width >= WIDE_WIDTH else key for key, name in SORT_BY_KEY.items()}
    chosen = [
        Text(names[key], style="reverse" if name == look.sort else "") for key, name in SORT_BY_KEY.items()
    ]
    return [part for one in chosen for part in (one, Text(" "))][:-1]


# --- the cells --------------------------------------------------------------------------------------


def state_text(name: str) -> Text:
    return Text(name, style=STATE_STYLES.get(name, ""))


def pluralize(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _truncate(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _usage_cell(overview: FederationOverview, one: ClientStatus, what: str) -> Text:
    value = overview.usage(one, what)
    return (
        Text("–", style="dim") if value is None else Text(f"{value:.0%}", style="red" if value > 0.9 else "")
    )


def _temperature_cell(overview: FederationOverview, one: ClientStatus) -> Text:
    value = overview.usage(one, "temperature_c")
    return (
        Text("–", style="dim") if value is None else Text(f"{value:.0f}°", style="red" if value > 80 else "")
    )


def _last_seen_cell(overview: FederationOverview, one: ClientStatus, now: datetime) -> Text:
    heard = overview.heard.get(one.client)
    if heard is None:
        return Text("–", style="dim")
    seconds = max(0.0, (now - heard).total_seconds())
    return Text(format_short_duration(seconds), style="bold yellow" if seconds > STALE_S else "")


def format_short_duration(seconds: float) -> str:
    """``3s``, ``5m``, ``2h``, ``4d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _reason_cell(overview: FederationOverview, one: ClientStatus) -> Text:
    waiting = one.no is None and one.state("client") == "serving"
    return Text(printable(overview.why(one)), style="dim" if waiting else "yellow")


COLUMNS: Final = (
    ClientColumn("client", 12, lambda _, one, __: Text(one.client, style="bold"), "name"),
    ClientColumn("task", 10, lambda _, one, __: Text(one.task), from_width=WIDE_WIDTH),
    ClientColumn("state", 10, lambda _, one, __: state_text(one.state("client")), "state"),
    ClientColumn("training", 9, lambda _, one, __: state_text(one.state("fl_client")), "training"),
    ClientColumn(
        "predicts", 8, lambda _, one, __: state_text(one.state("inference")), from_width=MIDDLE_WIDTH
    ),
    ClientColumn(
        "model", 6, lambda _, one, __: Text(f"v{one.model_version}" if one.model_version else "–"), "model"
    ),
    ClientColumn("code", 12, lambda _, one, __: Text(short_version(one.code_version)), from_width=WIDE_WIDTH),
    ClientColumn("cpu", 4, lambda overview, one, _: _usage_cell(overview, one, "cpu"), "cpu", right=True),
    ClientColumn(
        "mem", 4, lambda overview, one, _: _usage_cell(overview, one, "memory"), "memory", right=True
    ),
    ClientColumn(
        "heat",
        5,
        lambda overview, one, _: _temperature_cell(overview, one),
        "heat",
        from_width=MIDDLE_WIDTH,
        right=True,
    ),
    ClientColumn("seen", 5, _last_seen_cell, "seen", right=True),
    ClientColumn("why it does not train", 0, lambda overview, one, _: _reason_cell(overview, one), "why"),
)
