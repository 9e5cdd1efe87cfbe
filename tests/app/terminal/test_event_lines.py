"""Each kind of message as one short line."""

from datetime import UTC, datetime, timedelta

import pytest

from fedbus.app.bus_session import parse_time
from fedbus.app.terminal.event_lines import describe_facts, message_record, render_line, sender_of, short_text
from fedbus.app.terminal.output import format_age, format_size
from fedbus.app.terminal.plain import to_json
from fedbus.bus.stream_reader import StoredMessage
from fedbus.contracts.envelope import make_envelope
from fedbus.contracts.examples import BLOB, EXAMPLES, MODEL, PLAN, RESULT
from fedbus.contracts.message import Message
from fedbus.contracts.server import ServerData, StoreProblem
from fedbus.contracts.serving import ModelComparison
from fedbus.contracts.transition import Transition


def make_stored_message(message: Message) -> StoredMessage:
    return StoredMessage(
        message, make_envelope(message, source="fedbus/dev/flower-client/c1"), "fedbus.dev.x.y", 7
    )


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda one: one.name)
def test_every_message_is_one_line_of_text_and_of_json(message: Message) -> None:
    line = render_line(make_stored_message(message)).plain

    assert "\n" not in line
    assert "flower-client c1" in line
    assert len(line) < 350
    assert "\n" not in to_json(message_record(make_stored_message(message)))


def test_control_characters_do_not_reach_the_terminal() -> None:
    (transition,) = [one for one in EXAMPLES.values() if one.name == "transition"]
    hostile = transition.model_copy(update={"reason": "\x1b]0;owned\x07\x1b[2J\nserver gone"})
    line = render_line(make_stored_message(hostile)).plain

    assert line.isprintable()
    assert line.endswith("[2J server gone")


def test_a_transition_shows_its_states_and_its_event() -> None:
    (transition,) = [one for one in EXAMPLES.values() if one.name == "transition"]
    assert describe_facts(transition) == [("serving → learning", "bold"), " on client_start: run mnist-2"]


def test_a_store_problem_is_named_on_its_own_event() -> None:
    damaged = Transition(
        task="mnist",
        event="store_unavailable",
        source="waiting",
        target="waiting",
        reason="v2 is corrupt",
        facts=ServerData(task="mnist", trouble=StoreProblem.DAMAGED),
    )
    assert describe_facts(damaged)[1] == " on store_unavailable (damaged): v2 is corrupt"
    later = damaged.model_copy(update={"event": "run_cancelled", "reason": "by hand"})
    assert describe_facts(later)[1] == " on run_cancelled: by hand"


def test_values_are_short() -> None:
    assert short_text(MODEL) == "v2:9f86d081"
    assert short_text(BLOB) == "9f86d081(440 kB)"
    assert short_text(PLAN) == "4-rounds,quorum-3"
    assert short_text(RESULT) == "loss:0.25,accuracy:0.9375,s:6.5,clients:2"
    assert short_text(ModelComparison()) == "samples:0,errors:0"
    assert short_text(ModelComparison(samples=7, disagreement=0.0)) == "samples:7,errors:0,disagreement:0"
    assert short_text(2.073e-06) == "<0.001"
    assert short_text(-2.073e-06) == ">-0.001"
    assert [short_text(one) for one in (0.0, 0.0625, 43200.0, 9999.6)] == ["0", "0.0625", "43200", "10000"]
    assert short_text(True) == "True"
    assert short_text(None) == short_text("") == short_text(()) == ""


def test_an_agent_of_the_server_side_has_no_owner() -> None:
    assert sender_of("fedbus/dev/server-manager/server") == "server-manager"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("10 min", 600), ("2h", 7200), ("1d", 86400)]
)
def test_a_time_may_be_relative(text: str, seconds: float) -> None:
    assert abs((datetime.now(UTC) - parse_time(text)).total_seconds() - seconds) < 5


def test_a_time_may_be_a_date() -> None:
    assert parse_time("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_time("2026-01-31T12:00").tzinfo is not None


def test_ages_and_sizes_have_units() -> None:
    now = datetime.now(UTC)
    assert [format_age(now - timedelta(seconds=s)) for s in (3, 300, 7200, 400_000)] == [
        "3 s ago",
        "5 min ago",
        "2 h ago",
        "5 d ago",
    ]
    assert [format_size(count) for count in (0, 999, 439_576, 1.2e9)] == ["0 B", "999 B", "440 kB", "1.2 GB"]
