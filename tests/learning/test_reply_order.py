"""Replies in the order of clients."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.learning.library import ClientReply, MessengerClosed, OutgoingMessage
from fedbus.learning.payload import Payload
from fedbus.learning.reply_order import RepliesInClientOrder

NO_PAYLOAD = Payload.pack(())


def message(client: str) -> OutgoingMessage:
    return OutgoingMessage(client=client, kind="train", payload=NO_PAYLOAD)


@given(st.permutations(["c1", "c1", "c2", "c3", "c4"]), st.randoms(use_true_random=False))
def test_replies_come_by_client_in_any_order_of_arrival(clients: list[str], random: Random) -> None:
    messages = [message(client) for client in clients]
    arrived = [ClientReply(request=one, round=1) for one in messages]
    random.shuffle(arrived)

    ordered = list(RepliesInClientOrder(iter(arrived), messages))

    assert [reply.client for reply in ordered] == sorted(clients)
    assert [reply.request for reply in ordered if reply.client == "c1"] == [
        one for one in messages if one.client == "c1"
    ]


def test_a_reply_is_yielded_before_later_clients_answer() -> None:
    messages = [message("c1"), message("c2")]
    arrived: list[ClientReply] = []

    def arrive() -> Iterator[ClientReply]:
        for one in messages:
            arrived.append(ClientReply(request=one, round=1))
            yield arrived[-1]

    replies = RepliesInClientOrder(arrive(), messages)

    assert (next(replies).client, len(arrived)) == ("c1", 1)


def test_the_end_of_the_run_is_raised_at_each_step() -> None:
    class ClosedReplies(Iterator[ClientReply]):
        def __next__(self) -> ClientReply:
            raise MessengerClosed("the run is over")

    replies = RepliesInClientOrder(ClosedReplies(), [message("c1")])

    for _ in range(2):
        with pytest.raises(MessengerClosed):
            next(replies)
