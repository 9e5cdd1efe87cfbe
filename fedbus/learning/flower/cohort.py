"""The cohort of a round, for any strategy: client selection, weights of updates, and contributions.

Configuration enables each of them. Without configuration the strategy runs as it is.
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
from fedbus.learning.flower.replies import ReplyStream
from fedbus.learning.round_log import RoundLog

T = TypeVar("T")
log = structlog.get_logger("fedbus.learning")


@dataclass
class CohortPolicy:
    """The cohort policy of one run. *client_of* maps Flower's node id to the client."""

    client_of: Callable[[int], str] = str
    selection: ClientSelection = field(default_factory=ClientSelection)
    contributions: ContributionEvaluator = field(
        default_factory=lambda: ContributionEvaluator(ContributionLimits())
    )
    _selected: list[str] = field(default_factory=list)
    _initial_arrays: ArrayRecord | None = None
    """The global model at the start of the round."""

    @property
    def reads_updates(self) -> bool:
        """Whether single updates are read or weighted, apart from the aggregation."""
        return self.selection.weights is not None or self.contributions.is_enabled

    def select_messages(self, messages: Iterable[Message], start: ArrayRecord) -> Iterable[Message]:
        """Filter the strategy's *messages*, which train the model *start*, to those of the selected clients."""
        if (
            self.selection.max_clients is None
            and self.selection.weights is None
            and not self.contributions.is_enabled
        ):
            return messages
        addressed = [(message, self.client_of(message.metadata.dst_node_id)) for message in messages]
        selected = self.selection.choose(client for _, client in addressed)
        self._selected, self._initial_arrays = sorted(selected), start
        return [message for message, client in addressed if client in selected]

    def select_evaluation(self, messages: Any) -> Any:
        """Filter the strategy's *messages*, which evaluate, to those of the selected clients."""
        if self.selection.max_clients is None or not self.selection.is_random:
            return messages
        addressed = [(message, self.client_of(message.metadata.dst_node_id)) for message in messages]
        selected = self.selection.choose_for_evaluation(client for _, client in addressed)
        return [message for message, client in addressed if client in selected]

    def aggregate(
        self,
        aggregate: Callable[[Any], T],
        replies: Any,
        *,
        round_number: int,
        evaluate: Callable[..., Any] | None,
        round_log: RoundLog,
    ) -> T:
        """Return *aggregate* of the weighted *replies*, and write the contributions of the clients to *round_log*."""
        measures = evaluate is not None and self.contributions.is_due(round_number)
        if not (measures or self.selection.weights is not None):
            return aggregate(replies)
        with ExitStack() as stack:
            observers: list[Callable[[Message], None]] = []
            if self.selection.weights is not None:
                observers.append(self._scale_sample_count)
            updates: RoundUpdates | None = None
            if measures:
                directory = Path(stack.enter_context(make_update_directory()))
                players = self.contributions.select_players(self._selected)
                updates = RoundUpdates(directory, players, start=self._initial_arrays)
                observers.append(UpdateRecorder(updates, self.client_of, WEIGHTED_BY).record)
            result = aggregate(_observe_replies(replies, observers))
            if updates is not None and evaluate is not None:
                self._measure_contributions(updates, evaluate, round_number, round_log)
        return result

    def _measure_contributions(
        self, updates: RoundUpdates, evaluate: Callable[..., Any], round_number: int, round_log: RoundLog
    ) -> None:
        try:
            round_log.set_contributions(self.contributions.evaluate_updates(updates, evaluate, round_number))
        except Exception as error:  # noqa: BLE001 - a failed evaluation must not end the run
            log.warning("Contribution measurement failed", round=round_number, reason=str(error))

    def _scale_sample_count(self, reply: Message) -> None:
        """Multiply the sample count of *reply*, which is its weight in the strategy, by the client's factor."""
        if reply.has_error():
            return
        factor = self.selection.weight_factor(self.client_of(reply.metadata.src_node_id))
        for metrics in reply.content.metric_records.values():
            samples = metrics.get(WEIGHTED_BY)
            if isinstance(samples, int | float):
                metrics[WEIGHTED_BY] = samples * factor


WEIGHTED_BY = "num-examples"
"""Flower's default `weighted_by_key`: the sample count of an update."""


def _observe_replies(
    replies: Iterable[Message], observers: list[Callable[[Message], None]]
) -> ReplyStream | list[Message]:
    """Return the same replies; all *observers* get each reply before the aggregation does."""

    def observe(reply: Message) -> Message:
        for observer in observers:
            observer(reply)
        return reply

    observed = map(observe, replies)
    if isinstance(replies, ReplyStream):
        return ReplyStream(observed, is_deterministic=replies.is_deterministic)
    return list(observed)
