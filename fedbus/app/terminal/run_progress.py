"""The progress of a run: its rounds as a bar, and the clients that have answered in the current round.

mnist-3 running ━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌ round 3 of 4  train: 2 of 3 clients answered  loss 0.2931
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedbus.app.terminal.output import STATE_STYLES
from fedbus.app.terminal.plain import pluralize, printable
from fedbus.app.terminal.top_screen import render_bar, rounds_done
from fedbus.app.terminal.update_counts import describe_updates
from fedbus.app.views.federation_status import apply_stored
from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import RoundReply
from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import RUN, RunData, RunEvent, RunState
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import EntityState, FederationView

BAR_WIDTH: Final = 24
REFRESH_PER_S: Final = 4
MAX_NAMES: Final = 3
"""Clients without an answer that the line names."""


class RunProgress:
    """The progress of one run as a line of text."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._view = FederationView()

    def apply(self, stored: StoredMessage) -> None:
        apply_stored(self._view, stored)

    async def follow(self, stream: AsyncIterator[StoredMessage]) -> None:
        async for stored in stream:
            self.apply(stored)

    def render(self) -> Text:
        """Render the current state of the run."""
        run = self._view.runs.get(self._run)
        state = run.state if run else ""
        start = Text.assemble((self._run, "bold"), " ", (state, STATE_STYLES.get(state, "")), " ")
        if run is None:
            return start
        done = rounds_done(run.data)
        total = run.data.plan.total_rounds_after(done, is_finished=run.state == RunState.FINISHED)
        parts = [
            describe_round(done, total, is_final=run.state in RUN.final),
            *self._describe_replies(run),
            *_describe_loss(run.data),
        ]
        bar = (render_bar(done, total, BAR_WIDTH), " ") if total else ()
        line = Text.assemble(start, *bar, "  ".join(parts))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line

    def _describe_replies(self, run: EntityState[RunData]) -> list[str]:
        if run.state in RUN.final:
            return []
        progress, waits_for = self._view.rounds.get(run.data.task), run.transition.waits_for
        if run.state != RunState.RUNNING or progress is None or progress.run != self._run:
            return [f"waits for {printable(waits_for)}"] if waits_for else []
        answered, pending = len(progress.answered), progress.pending_clients
        kind = progress.message_type.partition(".")[0]
        text = f"{kind}: {answered} of {pluralize(len(progress.requested), 'client')} answered"
        return [f"{text}, not {', '.join(pending[:MAX_NAMES])}" if answered and pending else text]


def describe_round(done: int, total: int, *, is_final: bool = False) -> str:
    """Describe the round after *done* finished ones: ``round 3 of 5``, or ``round 3`` if *total* is not known."""
    current = done if is_final else done + 1
    return f"round {min(current, total)} of {total}" if total else f"round {current}"


def _describe_loss(data: RunData) -> list[str]:
    last = data.rounds[-1] if data.rounds else None
    return [f"loss {last.loss:.4f}"] if last and last.loss is not None else []


def render_transition(stored: StoredMessage) -> Text:
    """Render a transition of a run as a line that fits a terminal."""
    move = stored.message
    assert isinstance(move, Transition)
    match move:
        case Transition(event=RunEvent.ROUND_FINISHED, facts=RunData(rounds=(*_, last))):
            failures = [f"{client} failed: {printable(why)}" for client, why in last.failures.items()]
            figures = [
                f"loss {last.loss:.4f}" if last.loss is not None else "",
                f"accuracy {last.accuracy:.2%}" if last.accuracy is not None else "",
                f"{last.seconds:.2f} s",
                pluralize(len(last.participants), "client") if last.round else "the initial model",
                *describe_updates(last),
                *failures,
            ]
            text = Text("  ".join([f"round {last.round}", *filter(None, figures)]))
        case _:
            text = Text.assemble(
                (move.target, STATE_STYLES.get(move.target, "")), "  ", printable(move.reason)
            )
    return Text.assemble((f"{stored.envelope.time.astimezone():%H:%M:%S}  ", "dim"), text)


@asynccontextmanager
async def show_progress(
    bus: Bus, run: str, *, task: str, since: datetime, console: Console, wanted: bool = True
) -> AsyncIterator[RunProgress]:
    """Show the progress line below the output of *console* while the block runs.

    There is no line if *wanted* is false or *console* is not a terminal. Apply the transitions of the run to the
    progress that this yields; it follows the messages of the rounds itself.
    """
    progress = RunProgress(run)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield progress
        return
    wanted_subjects = [subjects.wildcard_for(bus.fed, kind, task=task) for kind in (RoundMessage, RoundReply)]
    async with (
        bus.read_stream(events_stream(bus.fed), wanted_subjects, since=since) as stream,
        background_task(progress.follow(stream), name=f"follow the rounds of {run}"),
    ):
        with Live(
            console=console,
            get_renderable=progress.render,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        ):
            yield progress
