"""Counts what the replies of a run contribute to its rounds, for all messengers."""

from collections import defaultdict
from dataclasses import replace
from typing import Final

from fedbus.learning.library import ClientReply, RoundTally

MAX_FAILURE_CHARS: Final = 500
"""The limit of the reason of a failed client in the result of a round."""
MAX_SAMPLES: Final = 2**53
"""The limit of the samples that one client reports: larger integers do not survive all encodings."""


class RoundTallies:
    """The tallies of a run, by round. It has no lock: the messenger calls it under its own."""

    def __init__(self) -> None:
        self._tallies: defaultdict[int, RoundTally] = defaultdict(RoundTally)

    def accept(self, reply: ClientReply, samples: int) -> None:
        """Record a valid reply, as `Messenger.accept` does."""
        tally = self._tallies[reply.round]
        if reply.timing is not None:
            tally.exchanges.append(reply.timing)
        # a client without metrics is a participant, too, where no message trains
        tally.figures.setdefault(reply.client, {}).update(reply.metrics)
        phase = _phase(reply)
        if phase == "train":
            tally.participants[reply.client] = max(0, min(samples, MAX_SAMPLES))
            tally.train_s[reply.client] = reply.timing.train_s if reply.timing else 0.0
        elif phase == "evaluate":
            tally.evaluated.add(reply.client)

    def reject(self, reply: ClientReply, reason: str) -> None:
        """Record a useless reply, as `Messenger.reject` does."""
        tally = self._tallies[reply.round]
        text = reason.removeprefix(f"{reply.client}: ")[:MAX_FAILURE_CHARS]
        tally.failures[reply.client] = text
        phase = _phase(reply)
        if phase == "train":
            tally.training_failures[reply.client] = text
        elif phase == "evaluate":
            tally.evaluation_failures[reply.client] = text

    def copy(self, round_number: int) -> RoundTally:
        """Return the tally of the round so far. It does not change later."""
        tally = self._tallies.get(round_number, RoundTally())
        return replace(
            tally,
            participants=dict(tally.participants),
            failures=dict(tally.failures),
            training_failures=dict(tally.training_failures),
            evaluated=set(tally.evaluated),
            evaluation_failures=dict(tally.evaluation_failures),
            train_s=dict(tally.train_s),
            figures={client: dict(figures) for client, figures in tally.figures.items()},
            exchanges=list(tally.exchanges),
        )


def _phase(reply: ClientReply) -> str:
    return reply.request.kind.partition(".")[0]
