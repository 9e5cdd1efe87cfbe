"""The parts that all messengers share."""

import threading
from dataclasses import replace

import pytest

from fedbus.contracts.run import RunPlan
from fedbus.learning import run_messenger
from fedbus.learning.library import MessengerClosed, OutgoingMessage
from fedbus.learning.payload import Payload
from fedbus.learning.run_messenger import RunMessenger, UnclaimedReplies, without_payload

MESSAGE = OutgoingMessage(client="c1", kind="train", payload=Payload.pack([b"weights"]))


def open_messenger() -> RunMessenger:
    return RunMessenger("run-1", RunPlan(round_s=20.0), threading.Condition())


def test_the_oldest_unclaimed_reply_is_dropped_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_messenger, "MAX_UNCLAIMED_REPLIES", 2)
    replies = UnclaimedReplies[str]()
    for number in range(4):
        replies.add(f"m{number}", f"reply {number}")
    assert "m1" not in replies
    assert replies.take() == "reply 2"
    assert replies.collect(["m0", "m3", "m3"]) == ["reply 3"]  # each once
    assert not replies
    assert replies.take() is None


@pytest.mark.parametrize(("ttl_s", "limit_s"), [(None, 20.0), (5.0, 5.0), (50.0, 20.0)])
def test_a_message_has_the_lower_of_two_limits(ttl_s: float | None, limit_s: float) -> None:
    assert open_messenger()._limit_s(replace(MESSAGE, ttl_s=ttl_s)) == limit_s


def test_a_message_without_a_round_counts_for_the_one_before() -> None:
    messenger = open_messenger()
    rounds = [messenger._round_of(replace(MESSAGE, round=number)) for number in (None, 3, None, 1, None)]
    assert rounds == [0, 3, 3, 1, 1]


def test_the_first_reason_of_the_end_counts() -> None:
    messenger = open_messenger()
    messenger._check_open()
    for reason in ("the run is cancelled", "the simulation is over"):
        messenger._end(reason)
    with pytest.raises(MessengerClosed, match="the run is cancelled"):
        messenger._check_open()


def test_a_waiting_reply_does_not_keep_the_payload_of_its_request() -> None:
    without = without_payload(MESSAGE)
    assert without.payload.size_bytes == 0
    assert replace(without, payload=MESSAGE.payload) == MESSAGE
