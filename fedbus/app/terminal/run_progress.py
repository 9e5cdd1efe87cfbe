"""How far a run is: its rounds as a bar, and in the round under way who has answered so far.

mnist-3 running ━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌ round 3 of 4  train: 2 of 3 clients answered  loss 0.2931
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedbus.app.terminal.output import STATE_STYLES, printable
from fedbus.app.terminal.top_screen import pluralize, render_bar, rounds_done
from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import RoundReply
from fedbus.contracts.run import RUN, RunData, RunEvent, RunState
from fedbus.contracts.server import RoundMessage
from fedbus.contracts.transition import Transition

BAR_WIDTH: Final = 24
REFRESH_PER_S: Final = 4


class RunProgress:
    """Folded from the moves of *run* and from the messages of its rounds."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._state = ""
        self._waits_for = ""
        self._facts: RunData | None = None
        self._phase = (0, "")
        """The round and the kind of message that were asked last."""
        self._waiting: dict[str, str] = {}
        """Whom an answer is awaited of, by the message."""
        self._asked_count = 0

    def see(self, seen: StoredMessage) -> None:
        match seen.message:
            case Transition(facts=RunData(run=self._run) as facts) as move:
                self._state, self._waits_for, self._facts = move.target, move.waits_for, facts
            case RoundMessage(run=self._run) as message:
                self._apply_request(message)
            case RoundReply(run=self._run) as reply:
                self._waiting.pop(reply.reply_to, None)

    def _apply_request(self, message: RoundMessage) -> None:
        phase = (message.round or 0, message.message_type)
        if phase != self._phase:
            self._phase, self._asked_count, self._waiting = phase, 0, {}
        self._asked_count += 1
        self._waiting[message.message_id] = message.client

    def line(self) -> Text:
        """It, now."""
        begin = Text.assemble((self._run, "bold"), " ", (self._state, STATE_STYLES.get(self._state, "")), " ")
        if self._facts is None:
            return begin
        done, of = rounds_done(self._facts), self._facts.plan.rounds
        parts = [
            f"round {min(done + 1, of)} of {of}",
            *self._describe_answers(),
            *self._describe_loss(self._facts),
        ]
        whole = Text.assemble(begin, render_bar(done, of, BAR_WIDTH), " ", "  ".join(parts))
        whole.no_wrap, whole.overflow = True, "ellipsis"
        return whole

    def _describe_answers(self) -> list[str]:
        if self._state in RUN.final:
            return []
        if self._state != RunState.RUNNING or not self._asked_count:
            return [f"waits for {printable(self._waits_for)}"] if self._waits_for else []
        answered = self._asked_count - len(self._waiting)
        kind = self._phase[1].partition(".")[0]
        told = f"{kind}: {answered} of {pluralize(self._asked_count, 'client')} answered"
        left = ", ".join(sorted(self._waiting.values())[:3])
        return [f"{told}, not {left}" if answered and self._waiting else told]

    @staticmethod
    def _describe_loss(facts: RunData) -> list[str]:
        last = facts.rounds[-1] if facts.rounds else None
        return [f"loss {last.loss:.4f}"] if last and last.loss is not None else []

    async def follow(self, said: AsyncIterator[StoredMessage]) -> None:
        async for seen in said:
            self.see(seen)


def render_transition(seen: StoredMessage) -> Text:
    """A move of a run in a line that fits a terminal."""
    move = seen.message
    assert isinstance(move, Transition)
    match move:
        case Transition(event=RunEvent.ROUND_FINISHED, facts=RunData(rounds=(*_, last))):
            failures = [f"{client} failed: {printable(why)}" for client, why in last.failures.items()]
            figures = [
                f"loss {last.loss:.4f}" if last.loss is not None else "",
                f"accuracy {last.accuracy:.2%}" if last.accuracy is not None else "",
                f"{last.seconds:.2f} s",
                pluralize(len(last.participants), "client") if last.round else "the model it begins with",
                *failures,
            ]
            said = Text("  ".join([f"round {last.round}", *filter(None, figures)]))
        case _:
            said = Text.assemble(
                (move.target, STATE_STYLES.get(move.target, "")), "  ", printable(move.reason)
            )
    return Text.assemble((f"{seen.envelope.time.astimezone():%H:%M:%S}  ", "dim"), said)


@asynccontextmanager
async def show_progress(
    bus: Bus, run: str, *, task: str, since: datetime, console: Console, wanted: bool = True
) -> AsyncIterator[RunProgress]:
    """The bar below what *console* prints, for as long as the block runs.

    Where that is no terminal, or the bar is not *wanted*, there is none.
    """
    progress = RunProgress(run)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield progress
        return
    words = [subjects.wildcard_for(bus.fed, kind, task=task) for kind in (RoundMessage, RoundReply)]
    async with (
        bus.watch(events_stream(bus.fed), words, since=since) as said,
        background_task(progress.follow(said), name=f"answers in {run}"),
    ):
        with Live(
            console=console,
            get_renderable=progress.line,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        ):
            yield progress
