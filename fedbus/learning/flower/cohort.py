"""Between a strategy and its clients: who trains, what their updates weigh, and what they were worth.

All three by configuration and over any strategy; where nothing is configured, nothing is touched.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from flwr.app import ArrayRecord, Message

from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.flower.contribution import (
    ContributionEvaluator,
    ContributionLimits,
    RoundUpdates,
    UpdateRecorder,
    make_update_directory,
)
from fedbus.learning.flower.replies import Replies
from fedbus.learning.flower.round_log import RoundLog

T = TypeVar("T")
log = structlog.get_logger("fedbus.learning")


@dataclass
class CohortPolicy:
    """For one run. *client_of*: the client that Flower knows as a node."""

    client_of: Callable[[int], str] = str
    selection: ClientSelection = field(default_factory=ClientSelection)
    contributions: ContributionEvaluator = field(
        default_factory=lambda: ContributionEvaluator(ContributionLimits())
    )
    _members: list[str] = field(default_factory=list)
    _start: ArrayRecord | None = None

    def chosen(self, messages: Iterable[Message], start: ArrayRecord) -> Iterable[Message]:
        """Of the *messages* that the strategy would send to train *start*, those that are sent."""
        if self.selection.most is None and self.selection.weights is None and not self.contributions.active:
            return messages
        each = [(message, self.client_of(message.metadata.dst_node_id)) for message in messages]
        chosen = self.selection.choose(client for _, client in each)
        self._members, self._start = sorted(chosen), start
        return [message for message, client in each if client in chosen]

    def aggregated(
        self,
        aggregate: Callable[[Any], T],
        replies: Any,
        *,
        round_number: int,
        evaluate: Callable[..., Any] | None,
        log: RoundLog,
    ) -> T:
        """What *aggregate* makes of the *replies*; what each was worth goes to the *log*."""
        looks = evaluate is not None and self.contributions.looks_at(round_number)
        if not isinstance(replies, Replies) or not (looks or self.selection.weights is not None):
            return aggregate(replies)
        with ExitStack() as stack:
            see: list[Callable[[Message], None]] = [self._weigh] if self.selection.weights is not None else []
            updates: RoundUpdates | None = None
            if looks:
                place = Path(stack.enter_context(make_update_directory()))
                updates = RoundUpdates(place, self.contributions.players(self._members), start=self._start)
                see.append(UpdateRecorder(updates, self.client_of, WEIGHTED_BY).see)
            result = aggregate(_observe_replies(replies, see))
            if updates is not None and evaluate is not None:
                self._value(updates, evaluate, round_number, log)
        return result

    def _value(
        self, updates: RoundUpdates, evaluate: Callable[..., Any], round_number: int, rounds: RoundLog
    ) -> None:
        try:
            rounds.set_contributions(self.contributions.worth(updates, evaluate, round_number))
        except Exception as error:  # noqa: BLE001 - the app's evaluation is asked beside the run, and may not end it
            log.warning("contributions were not found out", round=round_number, reason=str(error))

    def _weigh(self, reply: Message) -> None:
        """Multiply the samples that the reply names, which is what strategies weigh it by."""
        if reply.has_error():
            return
        factor = self.selection.factor(self.client_of(reply.metadata.src_node_id))
        for metrics in reply.content.metric_records.values():
            samples = metrics.get(WEIGHTED_BY)
            if isinstance(samples, int | float):
                metrics[WEIGHTED_BY] = samples * factor


WEIGHTED_BY = "num-examples"
"""Flower's own name for the samples of an update."""


def _observe_replies(replies: Replies, see: list[Callable[[Message], None]]) -> Replies:
    """The same replies, each shown to all of *see* before it is handed on."""
    source = replies.drain()

    def take() -> Message:
        message = next(source)
        for one in see:
            one(message)
        return message

    return Replies(len(replies), take)
