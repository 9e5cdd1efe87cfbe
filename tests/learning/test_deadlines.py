"""The earliest of many deadlines is that of a plain minimum."""

from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.learning.deadlines import MIN_COMPACTED, Deadlines
from fedbus.learning.round_tracker import RoundTracker, SentMessage

NAMES = st.sampled_from("abcde")
CHANGES = st.lists(st.tuples(NAMES, st.none() | st.integers(0, 9)), max_size=200)
Step: TypeAlias = tuple[str, str, float]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "heartbeat", "fail", "send", "reply", "expire", "disconnected"]),
        NAMES,
        st.integers(0, 8).map(float),
    ),
    max_size=60,
)


@given(CHANGES)
def test_the_earliest_deadline_is_the_minimum(changes: list[tuple[str, int | None]]) -> None:
    deadlines, plain = Deadlines(), dict[str, float]()
    for name, time in changes:
        if time is None:
            deadlines.remove(name)
            plain.pop(name, None)
        else:
            deadlines.set(name, time)
            plain[name] = time
        assert deadlines.earliest() == min(plain.values(), default=None)


def test_ended_deadlines_leave_the_memory() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.set(f"m{number}", 3600.0 + number)
        deadlines.remove(f"m{number - 1}")
    assert len(deadlines._heap) <= MIN_COMPACTED + 4
    assert deadlines.earliest() == 3600.0 + 9_999


@given(STEPS)
def test_a_tracker_wakes_at_the_earliest_of_its_limits(steps: list[Step]) -> None:
    """The times of contacts increase; a message may have any deadline."""
    tracker, now = RoundTracker("r", lost_after_s=5), 0.0
    for number, (step, client, seconds) in enumerate(steps):
        now += seconds / 4
        common = {"task": "t", "run": "r", "client": client}
        match step:
            case "join":
                tracker.handle(ClientJoined(**common), now)
            case "heartbeat":
                tracker.handle(Heartbeat(**common), now)
            case "fail":
                tracker.handle(FailTrain(**common, reason="no power"), now)
            case "send":
                tracker.record_sent(SentMessage(f"m{number}", client, seconds, now + seconds))
            case "reply":
                for sent in [one for one in tracker._open_messages.values() if one.client == client]:
                    reply = RoundReply(
                        **common, message_id="r1", reply_to=sent.message_id, created_at=0.0, ttl_s=1.0
                    )
                    tracker.handle(reply, now)
            case _:
                tracker.expire(now, connected=step == "expire")
        contacts = [time + 5 for time in tracker._last_contact.values()]
        deadlines = [sent.deadline for sent in tracker._open_messages.values()]
        assert tracker.next_deadline() == min([*contacts, *deadlines], default=None)
