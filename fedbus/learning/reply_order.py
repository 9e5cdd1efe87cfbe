"""Replies in the order of clients, for a run whose results must not depend on the order of arrival.

A floating-point sum depends on the order of its terms. With ``RunPlan.deterministic`` a messenger passes its replies
through `RepliesInClientOrder`, so every library adds them in the same order, on the fleet and in simulation.

The price is memory: a reply that arrives before those of earlier clients is held. If the first client answers last, the
replies of the whole cohort are in memory at the same time.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from fedbus.learning.library import ClientReply, OutgoingMessage


class RepliesInClientOrder(Iterator[ClientReply]):
    """The *replies* by client name, each as soon as those of all earlier clients have been yielded.

    There is one reply to each of *messages*. Several replies of one client have the order of its messages. An error of
    *replies* passes through, at each step.
    """

    def __init__(self, replies: Iterator[ClientReply], messages: Sequence[OutgoingMessage]) -> None:
        self._replies = replies
        order = sorted(range(len(messages)), key=lambda index: (messages[index].client, index))
        self._pending = deque(messages[index].message_id for index in order)
        self._early: dict[str, ClientReply] = {}

    def __next__(self) -> ClientReply:
        if not self._pending:
            raise StopIteration
        while self._pending[0] not in self._early:
            reply = next(self._replies)
            self._early[reply.request.message_id] = reply
        return self._early.pop(self._pending.popleft())
