"""The replies to a `send_and_receive`, as the list that Flower expects.

They are yielded in order of arrival. Plain iteration keeps them, like the list that Flower returns. `Replies.drain`
yields each once and releases it, so that an aggregation holds only a few in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

from flwr.app import ConfigRecord, Message, RecordDict

from fedbus.learning.flower.private_api import RunNotRunningException
from fedbus.learning.library import MessengerClosed


class GridClosed(MessengerClosed, RunNotRunningException):
    """The run has ended for this Grid. The text is the reason.

    Flower's background threads end on RunNotRunningException.
    """


class Replies(Sequence[Message]):
    """The replies to one `send_and_receive`, in order of arrival, as the list that Flower expects."""

    def __init__(self, count: int, take: Callable[[], Message]) -> None:
        self._missing = count
        self._count = count
        self._take = take
        self._cached: list[Message] = []
        self._drained = False

    def __bool__(self) -> bool:
        return self._count > 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        self._check_not_drained()
        for index in range(self._count):
            self._cache_until(index + 1)
            yield self._cached[index]

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        self._check_not_drained()
        self._cache_until(self._count)
        return self._cached[index]

    def drain(self) -> Iterator[Message]:
        """Yield each reply once, without keeping it. Raises RuntimeError on a second call."""
        self._check_not_drained()
        self._drained = True
        while self._cached:
            yield self._cached.pop(0)
        while self._missing:
            self._missing -= 1
            yield self._take()

    def _cache_until(self, count: int) -> None:
        while len(self._cached) < count:
            self._cached.append(self._take())
            self._missing -= 1

    def _check_not_drained(self) -> None:
        if self._drained:
            raise RuntimeError(
                "streaming aggregation has released the replies of this round. "
                'Set aggregation = "stock" in [tool.fedbus] for a strategy that reads them again'
            )


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
    for record in content.metric_records.values():
        for key in ("num-examples", "num_examples"):
            value = record.get(key)
            if isinstance(value, int | float):
                return int(value)
    return 0


def update_weight(content: RecordDict, weighted_by: str) -> float | None:
    """Return the metric *weighted_by* of the first MetricRecord; None if it is missing or not a number."""
    metrics = next(iter(content.metric_records.values()), None)
    weight = None if metrics is None else metrics.get(weighted_by)
    return float(weight) if isinstance(weight, int | float) else None  # an int would wrap int8 arrays
