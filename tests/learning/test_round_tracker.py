"""The book of a run: events in, effects out."""

from typing import Any

import pytest

from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.learning.round_tracker import (
    LostReason,
    NodesChanged,
    ReplyLost,
    ReplyReceived,
    RoundTracker,
    SentMessage,
)

C1: dict[str, Any] = {"task": "t", "client": "c1", "run": "t-1"}
ASKED = SentMessage("m1", "c1", timeout_s=30, deadline=130)


def reply(**changes: Any) -> RoundReply:
    return RoundReply(
        **{**C1, "message_id": "r1", "reply_to": "m1", "created_at": 0.0, "ttl_s": 1.0, **changes}
    )


@pytest.fixture
def book() -> RoundTracker:
    book = RoundTracker("t-1", lost_after_s=10)
    assert book.handle(ClientJoined(**C1), 100) == [NodesChanged()]
    assert book.sent(ASKED) == []
    return book


def test_a_reply_closes_its_message_and_a_repeat_is_dropped(book: RoundTracker) -> None:
    assert book.handle(reply(), 101) == [ReplyReceived(ASKED, reply())]
    assert book.handle(reply(), 102) == []
    assert not book.is_open("m1")


def test_nobody_answers_for_another(book: RoundTracker) -> None:
    book.handle(ClientJoined(**C1 | {"client": "c2"}), 100)
    assert book.handle(reply(client="c2"), 101) == []
    assert book.is_open("m1")


def test_other_runs_are_none_of_its_business(book: RoundTracker) -> None:
    other = C1 | {"run": "t-2"}
    assert book.handle(FailTrain(**other, reason="?"), 101) == []
    assert book.handle(ClientJoined(**other | {"client": "c2"}), 101) == []
    assert book.nodes == ["c1"]


def test_who_fails_is_gone_with_its_debts_until_it_joins_again(book: RoundTracker) -> None:
    gone = book.handle(FailTrain(**C1, reason="no power"), 101)
    assert gone == [NodesChanged(), ReplyLost(ASKED, LostReason.NODE, "no power")]
    assert book.handle(Heartbeat(**C1), 102) == []  # a late one
    assert book.nodes == []
    assert book.failed == {"c1": "no power"}
    again = SentMessage("m2", "c1", timeout_s=30, deadline=140)
    assert book.sent(again) == [ReplyLost(again, LostReason.NODE, "no power")]
    assert book.handle(ClientJoined(**C1), 103) == [NodesChanged()]
    assert book.failed == {}


def test_who_falls_silent_is_gone_and_back_when_heard(book: RoundTracker) -> None:
    assert book.handle(Heartbeat(**C1), 105) == []
    assert book.passed(114.9) == []
    assert book.passed(115) == [
        NodesChanged(),
        ReplyLost(ASKED, LostReason.NODE, "nothing was heard of it for 10 s"),
    ]
    assert book.handle(Heartbeat(**C1), 116) == [NodesChanged()]


def test_a_heartbeat_is_enough_for_a_server_that_was_lost_and_is_back() -> None:
    book = RoundTracker("t-1", lost_after_s=10)
    assert book.handle(Heartbeat(**C1), 100) == [NodesChanged()]
    assert book.admit(["c1", "c2"], 100) == [NodesChanged()]
    assert book.nodes == ["c1", "c2"]


def test_a_deadline_closes_a_message_and_the_client_stays(book: RoundTracker) -> None:
    book.handle(Heartbeat(**C1), 129)
    assert book.passed(130) == [ReplyLost(ASKED, LostReason.TIME, "no answer within 30 s")]
    assert book.nodes == ["c1"]
    assert book.handle(reply(), 131) == []  # too late


def test_while_the_bus_is_away_silence_counts_for_nothing(book: RoundTracker) -> None:
    assert book.passed(120, connected=False) == []
    assert book.passed(129) == []
    assert book.passed(129.9) == []
    assert NodesChanged() in book.passed(130)


def test_it_says_when_it_will_next_have_something_to_say(book: RoundTracker) -> None:
    assert book.next_wake() == 110
    book.handle(Heartbeat(**C1), 125)
    assert book.next_wake() == 130
    book.passed(130)
    assert book.next_wake() == 135
    assert RoundTracker("t-1", lost_after_s=10).next_wake() is None
