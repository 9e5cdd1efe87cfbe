"""Text from devices cannot control the terminal."""

import json

import pytest
from rich.text import Text

from fedbus.app.failures import describe_error
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import to_json
from fedbus.bus.errors import RequestRefused

HOSTILE = "[/] [bold]x[/bold] \x1b]0;owned\x07\x1b[2J\x9b31m\u202e\nend"
SHOWN = "[/] [bold]x[/bold]  ]0;owned  [2J 31m  end"


def test_a_cell_of_a_table_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(
        ("run", "state"), [(HOSTILE, output.state_text("running")), (Text(HOSTILE), 1)], empty=""
    )

    _, *rows = capsys.readouterr().out.splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "[/] [bold]x[/bold] ]0;owned [2J 31m end running",
        "[/] [bold]x[/bold] ]0;owned [2J 31m end 1",
    ]


def test_a_value_is_text() -> None:
    assert output.format_value(HOSTILE) == SHOWN


def test_json_is_faithful_and_printable() -> None:
    document = to_json({HOSTILE: [HOSTILE, "größer ☃"]}, indent=2)

    assert json.loads(document) == {HOSTILE: [HOSTILE, "größer ☃"]}
    assert "größer ☃" in document
    assert all(line.isprintable() for line in document.split("\n"))


def test_the_reason_of_a_refusal_is_text() -> None:
    line, _ = describe_error(RequestRefused("start_run", HOSTILE))

    assert line.isprintable()
