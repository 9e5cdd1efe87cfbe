"""How something that takes minutes is watched: a live picture on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbus.app.demo.prediction_load import PredictionCounts
from fedbus.app.local.stack import LocalStack
from fedbus.app.terminal.output import STATE_STYLES, printable
from fedbus.app.views.fleet import Fleet, TransitionView
from fedbus.contracts.run import RunEvent

MAX_TRANSITIONS_SHOWN = 8
REFRESH_PER_S = 4


class DemoView(Protocol):
    """Somebody who watches."""

    def shown(
        self, fleet: Fleet, counts: PredictionCounts, running: LocalStack
    ) -> AbstractContextManager[None]: ...

    def moved(self, step: TransitionView) -> None:
        """A lifecycle has moved."""


class PlainView:
    """One line a round and one for each end, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fleet = Fleet()

    @contextmanager
    def shown(self, fleet: Fleet, counts: PredictionCounts, running: LocalStack) -> Iterator[None]:  # noqa: ARG002
        self._fleet = fleet
        yield

    def moved(self, step: TransitionView) -> None:
        if step.kind == "run" and step.event == RunEvent.ROUND_FINISHED:
            last = self._fleet.runs[step.thing].rounds[-1]
            loss = f"loss {last.loss:.4f}" if last.loss is not None else "no loss"
            accuracy = f", accuracy {last.accuracy:.2%}" if last.accuracy is not None else ""
            self._print(f"{step.at.astimezone():%H:%M:%S} {step.thing} round {last.round}: {loss}{accuracy}")
        elif step.kind in ("run", "server", "client", "inference"):
            self._print(str(step))

    def _print(self, line: str) -> None:
        self._console.print(printable(line), highlight=False, soft_wrap=True, markup=False)


class LiveView:
    """Server, clients and rounds as they are now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fleet = Fleet()
        self._counts = PredictionCounts()
        self._running: LocalStack | None = None

    @contextmanager
    def shown(self, fleet: Fleet, counts: PredictionCounts, running: LocalStack) -> Iterator[None]:
        self._fleet, self._counts, self._running = fleet, counts, running
        with Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        ):
            yield

    def moved(self, step: TransitionView) -> None:
        """Shown with the next refresh."""

    def _render(self) -> RenderableType:
        return Group(
            self._render_server(),
            self._render_clients(),
            self._render_predictions(),
            self._render_transitions(),
        )

    def _render_server(self) -> RenderableType:
        fleet, run = self._fleet, self._fleet.current
        model = fleet.server_facts.model if fleet.server_facts else None
        line = Table.grid(padding=(0, 2))
        line.add_row(
            "server",
            _state_text(fleet.server),
            f"model v{model.version} {model.sha256[:8]}" if model else "no model yet",
            f"{len(fleet.ended)} runs done",
        )
        if run is not None:
            done = max((one.round for one in run.rounds), default=0)
            last = run.rounds[-1] if run.rounds else None
            loss = f"loss {last.loss:.4f}" if last and last.loss is not None else ""
            accuracy = f"accuracy {last.accuracy:.2%}" if last and last.accuracy is not None else ""
            bar = ProgressBar(total=run.plan.rounds, completed=done, width=24)
            line.add_row(run.run, bar, f"round {done} of {run.plan.rounds}", f"{loss}  {accuracy}")
        return Panel(line, title="fedbus", title_align="left")

    def _render_clients(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("client", "state", "training", "serving", "model", "endpoint"):
            table.add_column(name, min_width=8)
        for name, view in sorted(self._fleet.clients.items()):
            version = f"v{view.served.version}" if view.served else "–"
            states = (_state_text(state) for state in (view.state, view.training, view.inference))
            table.add_row(name, *states, version, view.endpoint)
        return table

    def _render_predictions(self) -> RenderableType:
        counts = self._counts
        style = "bold red" if counts.failed else "bold green"
        return Text(f"predictions: {counts.answered} answered, {counts.failed} failed", style=style)

    def _render_transitions(self) -> RenderableType:
        return Text(
            "\n".join(str(step) for step in self._fleet.steps[-MAX_TRANSITIONS_SHOWN:]),
            style="dim",
            overflow="ellipsis",
        )


def _state_text(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, ""))
