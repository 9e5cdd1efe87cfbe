"""What the demonstration tells as it goes."""

import io
from datetime import UTC, datetime

from rich.console import Console

from fedbus.app.demo.live_view import PlainView
from fedbus.app.views.fleet import TransitionView


def test_a_plain_line_tells_a_reason_and_does_nothing_to_the_terminal() -> None:
    said = io.StringIO()
    reason = "lost [/] \x1b[2J\x1b]0;a title\x07 and\nfound"
    PlainView(Console(file=said, width=200)).moved(
        TransitionView(datetime.now(UTC), "run", "mnist-1", "running", "run_failed", "failed", reason)
    )
    assert "lost [/]" in said.getvalue()
    assert said.getvalue().removesuffix("\n").isprintable()
