"""The display of `fedbus demo`: a live screen on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbus.app.demo.prediction_load import PredictionCounts
from fedbus.app.terminal.output import STATE_STYLES
from fedbus.app.terminal.plain import pluralize, printable
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.run import RunData, RunEvent
from fedbus.contracts.server import ServerState
from fedbus.domain.federation_view import EntityState, FederationView

MAX_TRANSITIONS_SHOWN: Final = 8
REFRESH_PER_S: Final = 4


class DemoDisplay(Protocol):
    """What shows the progress of a demo."""

    def show(self, view: FederationView, task: str, counts: PredictionCounts) -> AbstractContextManager[None]:
        """Show the state of *view* while the block runs."""

    def on_transition(self, entity: EntityState[LifecycleData]) -> None:
        """Show a transition; *entity* is in its new state."""


class PlainDisplay:
    """One line for each round and for each transition, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def show(self, view: FederationView, task: str, counts: PredictionCounts) -> Iterator[None]:  # noqa: ARG002 - of the base class
        yield

    def on_transition(self, entity: EntityState[LifecycleData]) -> None:
        match entity.data:
            case RunData(run=run, rounds=(*_, last)) if entity.transition.event == RunEvent.ROUND_FINISHED:
                loss = f"loss {last.loss:.4f}" if last.loss is not None else "no loss"
                accuracy = f", accuracy {last.accuracy:.2%}" if last.accuracy is not None else ""
                self._print(f"{entity.at.astimezone():%H:%M:%S} {run} round {last.round}: {loss}{accuracy}")
            case data if data.kind in ("run", "server", "client", "inference"):
                self._print(format_transition(entity))

    def _print(self, line: str) -> None:
        self._console.print(printable(line), highlight=False, soft_wrap=True, markup=False)


class LiveDisplay:
    """Server, clients and rounds as they are now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view = FederationView()
        self._task = ""
        self._counts = PredictionCounts()

    @contextmanager
    def show(self, view: FederationView, task: str, counts: PredictionCounts) -> Iterator[None]:
        self._view, self._task, self._counts = view, task, counts
        with Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        ):
            yield

    def on_transition(self, entity: EntityState[LifecycleData]) -> None:
        """Do nothing: the next refresh shows it."""

    def _render(self) -> RenderableType:
        return Group(
            self._render_server(),
            self._render_clients(),
            self._render_predictions(),
            self._render_transitions(),
        )

    def _render_server(self) -> RenderableType:
        server, model = self._view.servers.get(self._task), self._view.champion(self._task)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            "server",
            _state_text(server.state if server else ServerState.MODEL_INIT),
            f"model v{model.version} {model.sha256[:8]}" if model else "no model yet",
            pluralize(len(self._view.finished_runs), "finished run"),
        )
        if (active := self._view.active_run(self._task)) is not None:
            run = active.data
            done = max((one.round for one in run.rounds), default=0)
            last = run.rounds[-1] if run.rounds else None
            loss = f"loss {last.loss:.4f}" if last and last.loss is not None else ""
            accuracy = f"accuracy {last.accuracy:.2%}" if last and last.accuracy is not None else ""
            total = run.plan.total_rounds_after(done)
            bar = ProgressBar(total=total or None, completed=done, width=24)
            rounds = f"round {done} of {total}" if total else f"round {done}"
            line.add_row(run.run, bar, rounds, f"{loss}  {accuracy}")
        return Panel(line, title="fedbus", title_align="left")

    def _render_clients(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("client", "state", "training", "serving", "model", "endpoint"):
            table.add_column(name, min_width=8)
        for (name, _), client in sorted(self._view.clients.items()):
            version = f"v{client.served_model.version}" if client.served_model else "–"
            states = (client.state, client.training_state, client.inference_state)
            table.add_row(name, *map(_state_text, states), version, client.endpoint)
        return table

    def _render_predictions(self) -> RenderableType:
        counts = self._counts
        style = "bold red" if counts.failed else "bold green"
        return Text(f"predictions: {counts.answered} answered, {counts.failed} failed", style=style)

    def _render_transitions(self) -> RenderableType:
        newest = list(islice(reversed(self._view.history), MAX_TRANSITIONS_SHOWN))[::-1]
        return Text("\n".join(map(format_transition, newest)), style="dim", overflow="ellipsis")


def format_transition(entity: EntityState[LifecycleData]) -> str:
    """Format an entity's last transition as one line."""
    transition = entity.transition
    reason = f" ({transition.reason})" if transition.reason else ""
    start = f"{entity.at.astimezone():%H:%M:%S} {entity.data.kind} {entity.data.key}"
    return f"{start}: {transition.source or '•'} → {transition.target}{reason}"


def _state_text(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, ""))
