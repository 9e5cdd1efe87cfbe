"""One line a message: each kind can be told, and the facts are short."""

from datetime import UTC, datetime, timedelta

import pytest

from fedbus.app.bus_session import moment
from fedbus.app.terminal.event_lines import facts, line, record, short, who
from fedbus.app.terminal.output import ago, size, to_json
from fedbus.bus.bus import Seen
from fedbus.contracts.envelope import envelop
from fedbus.contracts.examples import BLOB, EXAMPLES, MODEL, PLAN, RESULT
from fedbus.contracts.message import Message
from fedbus.contracts.server import ServerFacts, StoreTrouble
from fedbus.contracts.serving import Beside
from fedbus.contracts.transition import Transition


def seen(message: Message) -> Seen:
    return Seen(message, envelop(message, source="fedbus/dev/flower-client/c1"), "fedbus.dev.x.y", 7)


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda one: one.word)
def test_every_message_is_one_line_for_a_person_and_one_for_a_program(message: Message) -> None:
    told = line(seen(message)).plain

    assert "\n" not in told
    assert "flower-client c1" in told
    assert len(told) < 350
    assert "\n" not in to_json(record(seen(message)))


def test_what_somebody_says_does_nothing_to_the_terminal() -> None:
    (transition,) = [one for one in EXAMPLES.values() if one.word == "transition"]
    hostile = transition.model_copy(update={"reason": "\x1b]0;owned\x07\x1b[2J\nserver gone"})
    told = line(seen(hostile)).plain

    assert told.isprintable()
    assert told.endswith("[2J server gone")


def test_a_transition_says_from_where_to_where_and_why() -> None:
    (transition,) = [one for one in EXAMPLES.values() if one.word == "transition"]
    assert facts(transition) == [("serving → learning", "bold"), " on client_start: run mnist-2"]


def test_a_repository_that_cannot_be_used_is_told_of_with_what_is_wrong_with_it() -> None:
    damaged = Transition(
        task="mnist",
        event="store_unavailable",
        source="waiting",
        target="waiting",
        reason="v2 is not what it was",
        facts=ServerFacts(task="mnist", trouble=StoreTrouble.DAMAGED),
    )
    assert facts(damaged)[1] == " on store_unavailable (damaged): v2 is not what it was"
    later = damaged.model_copy(update={"event": "run_cancelled", "reason": "by hand"})
    assert facts(later)[1] == " on run_cancelled: by hand"


def test_values_are_short() -> None:
    assert short(MODEL) == "v2:9f86d081"
    assert short(BLOB) == "9f86d081(440 kB)"
    assert short(PLAN) == "4-rounds,quorum-3"
    assert short(RESULT) == "loss:0.25,accuracy:0.9375,s:6.5,clients:2"
    assert short(Beside()) == "samples:0,errors:0"
    assert short(Beside(samples=7, disagreement=0.0)) == "samples:7,errors:0,disagreement:0"
    assert short(2.073e-06) == "<0.001"
    assert short(-2.073e-06) == ">-0.001"
    assert [short(one) for one in (0.0, 0.0625, 43200.0, 9999.6)] == ["0", "0.0625", "43200", "10000"]
    assert short(True) == "True"
    assert short(None) == short("") == short(()) == ""


def test_the_server_side_needs_no_name() -> None:
    assert who("fedbus/dev/server-manager/server") == "server-manager"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("10 min", 600), ("2h", 7200), ("1d", 86400)]
)
def test_a_time_may_be_so_long_ago(text: str, seconds: float) -> None:
    assert abs((datetime.now(UTC) - moment(text)).total_seconds() - seconds) < 5


def test_a_time_may_be_a_date() -> None:
    assert moment("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert moment("2026-01-31T12:00").tzinfo is not None


def test_how_long_ago_and_how_large_are_said_as_a_person_would() -> None:
    now = datetime.now(UTC)
    assert [ago(now - timedelta(seconds=s)) for s in (3, 300, 7200, 400_000)] == [
        "3 s ago",
        "5 min ago",
        "2 h ago",
        "5 d ago",
    ]
    assert [size(count) for count in (0, 999, 439_576, 1.2e9)] == ["0 B", "999 B", "440 kB", "1.2 GB"]
