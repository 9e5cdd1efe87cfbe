"""The replies to a `send_and_receive`: a list as in Flower, or a stream for a strategy that allows it."""

import math
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ConfigRecord, Message, RecordDict

from fedbus.learning.flower.array_records import metric_records_of
from fedbus.learning.flower.private_api import RunNotRunningException
from fedbus.learning.library import MessengerClosed


class GridClosed(MessengerClosed, RunNotRunningException):
    """The run has ended for this Grid. The text is the reason.

    Flower's background threads end on RunNotRunningException.
    """


class StreamedMessages(Iterable[Message]):
    """Messages whose replies the sender takes one by one and releases, so that memory does not grow with the cohort.

    `MessengerGrid.send_and_receive` returns a `ReplyStream` for them, and a list for all others.
    """

    def __init__(self, messages: Iterable[Message]) -> None:
        self._messages = messages

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages)


class ModeMessages(Iterable[Message]):
    """Messages that an aggregation mode sends when it is time. `MessengerGrid.send_and_receive` calls *exchange*.

    It passes its timeout, and returns the replies.
    """

    def __init__(
        self, messages: Iterable[Message], exchange: Callable[[float | None], list[Message]]
    ) -> None:
        self._messages = messages
        self.exchange = exchange

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages)


class ReplyStream(Iterator[Message]):
    """The replies to `StreamedMessages`, each once: in order of arrival, or of clients in a deterministic run."""

    def __init__(self, replies: Iterable[Message], *, is_deterministic: bool = False) -> None:
        self._replies = iter(replies)
        self.is_deterministic = is_deterministic
        """Whether the sum of the replies must have the same bits on each machine."""

    def __next__(self) -> Message:
        return next(self._replies)


def round_number_of(message: Message) -> int | None:
    """Return the round of *message*: Flower's group id if it is a number, else "server-round" of a ConfigRecord."""
    if message.metadata.group_id.isdecimal():
        return int(message.metadata.group_id)
    for record in message.content.values():
        if isinstance(record, ConfigRecord):
            number = record.get("server-round")
            if isinstance(number, int):
                return number
    return None


def sample_count(content: RecordDict) -> int:
    """Return the sample count ("num-examples") that the client reports; 0 if it reports none."""
    for record in metric_records_of(content).values():
        for key in ("num-examples", "num_examples"):
            value = record.get(key)
            if isinstance(value, int | float):
                return int(value) if math.isfinite(value) else 0
    return 0


def update_weight(content: RecordDict, weighted_by: str) -> float | None:
    """Return the metric *weighted_by* of the first MetricRecord; None if it is missing or not a number."""
    metrics = next(iter(metric_records_of(content).values()), None)
    weight = None if metrics is None else metrics.get(weighted_by)
    return float(weight) if isinstance(weight, int | float) else None  # an int would wrap int8 arrays
