"""The Grid of a run: Flower's Grid, with what the hooks of strategies need in addition."""

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedbus.learning.library import RoundTally

NO_FUNCTION: Final = "function registered with name"
"""A part of Flower's error text for a client whose code has no function for messages of this kind. Flower has no error
code for it: the error is `CLIENT_APP_RAISED`, as for any exception, and a SuperLink passes on only code and text."""


def without_missing_functions(tally: RoundTally) -> RoundTally:
    """Return *tally* without the failed evaluations of clients whose code has no function for it."""
    failures = {
        client: reason for client, reason in tally.evaluation_failures.items() if NO_FUNCTION not in reason
    }
    return replace(tally, evaluation_failures=failures)


class RunGrid(Grid):
    """The Grid of one run, whatever carries its messages."""

    def __init__(self) -> None:
        self._waits = threading.local()
        self.last_round = 0
        """The highest round that messages have counted for; 0 if none named a round."""
        self.checks_updates = False
        """Whether arrays with NaN or infinity, or of another shape than in the message, are the failure of a client."""

        self.training_refusal = ""
        """Why the app itself cannot send messages that train; empty if it can."""

    @property
    @abstractmethod
    def run_name(self) -> str:
        """The name of the run on the bus."""

    @abstractmethod
    def now(self) -> float:
        """Return the time in seconds on the clock of the run's messages."""

    @abstractmethod
    def client_of(self, node: int) -> str:
        """Return the client of Flower's node id *node*; a client that has left, too."""

    @abstractmethod
    def tally(self, round_number: int) -> RoundTally:
        """Return a copy of the participants of the round so far."""

    @abstractmethod
    def set_round(self, number: int | None) -> None:
        """Set the round of the run for which messages count from now on; None: the round that they name themselves."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    @property
    def is_waiting_for_nodes(self) -> bool:
        """Whether a strategy that runs in this thread polls for nodes if it only calls `get_node_ids`."""
        return getattr(self._waits, "is_strategy", False)

    @contextmanager
    def waiting_for_nodes(self) -> Iterator[None]:
        """Treat polling for nodes in this thread as a strategy's wait for clients, until the block ends."""
        before, self._waits.is_strategy = self.is_waiting_for_nodes, True
        try:
            yield
        finally:
            self._waits.is_strategy = before
