"""The progress of a simulation on a terminal: a line for each finished round, and below them a bar.

12:04:31  round 2  loss 0.4120  accuracy 87.60%  1.31 s  10 clients
mnist-sim-1 ━━━━━━━━━━━━━━━━╌╌╌╌╌╌╌╌ round 3 of 3  train: 7 of 10 clients  ETA 2 s  loss 0.4120  accuracy 87.60%

In a pipe there are only the lines.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedbus.app.terminal.plain import pluralize, printable
from fedbus.app.terminal.top_screen import render_bar
from fedbus.app.terminal.trace_waterfall import format_duration
from fedbus.app.terminal.update_counts import describe_updates
from fedbus.contracts.run import RoundResult

BAR_WIDTH: Final = 24
REFRESH_PER_S: Final = 4
BAR_STEPS: Final = 1000
"""Steps of the bar for one round."""
MAX_REASON_CHARS: Final = 160
RECENT_ROUNDS: Final = 10
"""Rounds from which the duration of the next ones is estimated."""
MIN_FRACTION: Final = 0.1
"""The share of a round from which its duration is estimated."""


class RoundClock:
    """Estimates the remaining time of a simulation from its finished rounds and the messages of the current one."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._round_started = now()
        self._durations: list[float] = []
        self._fraction = 0.0

    def begin(self) -> None:
        """Start the first round: what precedes it, such as the import of the app, happens once."""
        self._round_started = self._now()

    def set_fraction(self, fraction: float) -> None:
        """Set the share of the current round's messages that are answered, from 0 to 1."""
        self._fraction = fraction

    def end_round(self) -> None:
        now = self._now()
        self._durations.append(now - self._round_started)
        self._round_started, self._fraction = now, 0.0

    def remaining_s(self, rounds_left: int) -> float | None:
        """Return the seconds until the end, with *rounds_left* unfinished rounds; None if nothing is known yet."""
        if rounds_left <= 0:
            return 0.0
        elapsed = self._now() - self._round_started
        typical = self._durations[1:][-RECENT_ROUNDS:]  # the first one includes the start of the workers
        if typical:
            round_s = sum(typical) / len(typical)
        elif self._fraction >= MIN_FRACTION:
            round_s = elapsed / self._fraction
        elif self._durations:
            round_s = self._durations[0]
        else:
            return None
        return max(0.0, round_s - elapsed) + (rounds_left - 1) * round_s


class SimulationView:
    """The state of a simulation, as the line with the bar shows it."""

    def __init__(self, name: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._rounds = 0
        self._done = 0
        self._status = "imports the app"
        self._share = 0.0
        self._figures: list[str] = []
        self._clock = RoundClock(now)

    def start(self, *, rounds: int, done: int, clients: int, workers: int) -> None:
        """Show the start of round *done* + 1 of *rounds*; 0 if the number is not known."""
        self._rounds, self._done = rounds, done
        self._status = f"starts {pluralize(workers, 'worker')} for {pluralize(clients, 'client')}"
        self._clock.begin()

    def set_progress(self, kind: str, *, done: int, failed: int, total: int) -> None:
        """Show that *done* of *total* clients have answered messages of *kind*, *failed* of them with an error."""
        failures = f", {failed} failed" if failed else ""
        self._status = f"{kind.partition('.')[0]}: {done} of {pluralize(total, 'client')}{failures}"
        share = done / total if total else 0.0
        # the second kind of message in a round, such as `evaluate`, does not move the bar back
        self._share = max(self._share, share * (1.0 if kind.startswith("evaluate") else 0.9))
        self._clock.set_fraction(self._share)

    def end_round(self, result: RoundResult) -> None:
        """Show the result of a round."""
        self._figures = _metric_texts(result)
        if result.round > self._done:
            self._done = result.round
            self._clock.end_round()
        self._share, self._status = 0.0, ""

    def render(self) -> Text:
        """Render the line."""
        left = max(0, self._rounds - self._done)
        has_started = bool(self._rounds or self._done or self._share)
        current = self._done + 1 if left or not self._rounds else self._done
        parts = [
            (f"round {current} of {self._rounds}" if self._rounds else f"round {current}")
            if has_started
            else "",
            self._status,
        ]
        if left and (remaining := self._clock.remaining_s(left)) is not None:
            parts.append(f"ETA {_format_seconds(remaining)}")
        parts += self._figures
        line = Text.assemble((self._name, "bold"), " ")
        if self._rounds:
            done = int((self._done + (self._share if left else 0)) * BAR_STEPS)
            line.append_text(render_bar(done, self._rounds * BAR_STEPS, BAR_WIDTH))
            line.append(" ")
        line.append("  ".join(filter(None, parts)))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


def render_round(result: RoundResult, *, at: datetime) -> Text:
    """Render the result of a round as one line."""
    parts = [
        f"round {result.round}",
        *_metric_texts(result),
        f"{result.seconds:.2f} s" if result.round else "",
        pluralize(len(result.participants), "client") if result.round else "the initial model",
        *describe_updates(result),
    ]
    text = Text.assemble((f"{at.astimezone():%H:%M:%S}  ", "dim"), "  ".join(filter(None, parts)))
    if result.failures:
        client, reason = next(iter(result.failures.items()))
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        text.append(f"  {len(result.failures)} failed: {client}: {_shorten(reason)}{more}", "red")
    elif result.evaluation_failure:
        text.append(f"  {_shorten(result.evaluation_failure)}", "red")
    return text


@contextmanager
def show_line(render: Callable[[], Text], console: Console, *, wanted: bool = True) -> Iterator[None]:
    """Show the line of *render* below the output of *console* while the block runs, if that is a terminal."""
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with Live(console=console, get_renderable=render, refresh_per_second=REFRESH_PER_S, transient=True):
        yield


def _format_seconds(seconds: float) -> str:
    """Format a time without a part of a second, which would change at each refresh."""
    return format_duration(seconds) if seconds >= 60 else f"{max(1, round(seconds))} s"


def _metric_texts(result: RoundResult) -> list[str]:
    texts = []
    if result.loss is not None:
        texts.append(f"loss {result.loss:.4f}")
    if result.accuracy is not None:
        texts.append(f"accuracy {result.accuracy:.2%}")
    return texts


def _shorten(reason: str) -> str:
    text = printable(" ".join(reason.split()))
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"
