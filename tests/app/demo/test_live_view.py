"""What a demo prints while it runs."""

import io
from datetime import UTC, datetime

from rich.console import Console

from fedbus.app.demo.live_view import PlainDisplay
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.run import RunData, RunPlan
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import EntityState


def run_failed(reason: str) -> EntityState[LifecycleData]:
    now = datetime.now(UTC)
    data = RunData(task="mnist", run="mnist-1", plan=RunPlan(), requested_at=now)
    transition = Transition(
        task="mnist", event="run_failed", source="running", target="failed", reason=reason, facts=data
    )
    return EntityState(transition, data, now, sequence=1)


def test_a_plain_line_shows_the_reason_and_no_control_characters() -> None:
    output = io.StringIO()
    reason = "lost [/] \x1b[2J\x1b]0;a title\x07 and\nfound"
    PlainDisplay(Console(file=output, width=200)).on_transition(run_failed(reason))
    assert "run mnist-1: running → failed (lost [/]" in output.getvalue()
    assert output.getvalue().removesuffix("\n").isprintable()
