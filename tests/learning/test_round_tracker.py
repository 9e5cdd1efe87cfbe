"""The round tracker: events in, effects out."""

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
SENT = SentMessage("m1", "c1", timeout_s=30, deadline=130)


def reply(**changes: Any) -> RoundReply:
    return RoundReply(
        **{**C1, "message_id": "r1", "reply_to": "m1", "created_at": 0.0, "ttl_s": 1.0, **changes}
    )


@pytest.fixture
def tracker() -> RoundTracker:
    tracker = RoundTracker("t-1", lost_after_s=10)
    assert tracker.handle(ClientJoined(**C1), 100) == [NodesChanged()]
    assert tracker.record_sent(SENT) == []
    return tracker


def test_a_reply_closes_its_message_and_a_repeat_is_dropped(tracker: RoundTracker) -> None:
    assert tracker.handle(reply(), 101) == [ReplyReceived(SENT, reply())]
    assert tracker.handle(reply(), 102) == []
    assert not tracker.is_open("m1")


def test_a_client_cannot_answer_for_another(tracker: RoundTracker) -> None:
    tracker.handle(ClientJoined(**C1 | {"client": "c2"}), 100)
    assert tracker.handle(reply(client="c2"), 101) == []
    assert tracker.is_open("m1")


def test_events_of_other_runs_have_no_effect(tracker: RoundTracker) -> None:
    other = C1 | {"run": "t-2"}
    assert tracker.handle(FailTrain(**other, reason="?"), 101) == []
    assert tracker.handle(ClientJoined(**other | {"client": "c2"}), 101) == []
    assert tracker.nodes == ["c1"]


def test_a_failed_client_is_absent_until_it_joins_again(tracker: RoundTracker) -> None:
    effects = tracker.handle(FailTrain(**C1, reason="no power"), 101)
    assert effects == [NodesChanged(), ReplyLost(SENT, LostReason.NODE, "no power")]
    assert tracker.handle(Heartbeat(**C1), 102) == []  # a late one
    assert tracker.nodes == []
    assert tracker.failed == {"c1": "no power"}
    second = SentMessage("m2", "c1", timeout_s=30, deadline=140)
    assert tracker.record_sent(second) == [ReplyLost(second, LostReason.NODE, "no power")]
    assert tracker.handle(ClientJoined(**C1), 103) == [NodesChanged()]
    assert tracker.failed == {}


def test_a_silent_client_is_absent_until_its_next_heartbeat(tracker: RoundTracker) -> None:
    assert tracker.handle(Heartbeat(**C1), 105) == []
    assert tracker.expire(114.9) == []
    assert tracker.expire(115) == [
        NodesChanged(),
        ReplyLost(SENT, LostReason.NODE, "no heartbeat for 10 s"),
    ]
    assert tracker.handle(Heartbeat(**C1), 116) == [NodesChanged()]


def test_a_heartbeat_is_enough_for_a_server_that_was_restarted() -> None:
    tracker = RoundTracker("t-1", lost_after_s=10)
    assert tracker.handle(Heartbeat(**C1), 100) == [NodesChanged()]
    assert tracker.admit(["c1", "c2"], 100) == [NodesChanged()]
    assert tracker.nodes == ["c1", "c2"]


def test_a_deadline_closes_a_message_and_the_client_stays(tracker: RoundTracker) -> None:
    tracker.handle(Heartbeat(**C1), 129)
    assert tracker.expire(130) == [ReplyLost(SENT, LostReason.TIME, "no reply within 30 s")]
    assert tracker.nodes == ["c1"]
    assert tracker.handle(reply(), 131) == []  # too late


def test_no_client_expires_while_nats_is_disconnected(tracker: RoundTracker) -> None:
    assert tracker.expire(120, connected=False) == []
    assert tracker.expire(129) == []
    assert tracker.expire(129.9) == []
    assert NodesChanged() in tracker.expire(130)


def test_the_next_wake_is_the_earliest_expiry(tracker: RoundTracker) -> None:
    assert tracker.next_deadline() == 110
    tracker.handle(Heartbeat(**C1), 125)
    assert tracker.next_deadline() == 130
    tracker.expire(130)
    assert tracker.next_deadline() == 135
    assert RoundTracker("t-1", lost_after_s=10).next_deadline() is None
