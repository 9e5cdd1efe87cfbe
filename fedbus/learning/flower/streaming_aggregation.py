"""Updates are added up as they arrive: the memory of a round does not grow with its cohort.

Flower's FedAvg lists all replies and then averages them. `streaming_aggregation` replaces
`FedAvg.aggregate_train`, in the ServerApp's own process, by one that adds each reply's arrays
into one accumulator and lets go of them; metrics, checks and logs stay Flower's own code, run
on what is left of the replies. Strategies that build on FedAvg's mean (FedProx, FedAdam,
FedAvgM, the DP wrappers) are served by it; those that need all updates at once (Krum, FedMedian)
never come here, and a strategy with its own metrics function or its own checks, which may look
into the arrays, gets Flower's code with all replies.

docs/decisions/0003-streaming-aggregation.md says why.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedbus.learning import npy
from fedbus.learning.flower.private_api import (
    NUMPY,
    BorrowedArray,
    aggregate_metricrecords,
    array_view,
    build_message,
)
from fedbus.learning.flower.replies import Replies

BLOCK_BYTES: Final = 512 * 1024
"""How much is multiplied at a time: it should stay in the cache until it is added."""

_STOCK_AGGREGATE = FedAvg.aggregate_train
_STOCK_CHECKS = FedAvg._check_and_log_replies  # noqa: SLF001 - an overridden one may look into the arrays
_EMPTY_ARRAY = Array("", (), "", b"")


@contextmanager
def streaming_aggregation() -> Iterator[None]:
    """Inside, FedAvg and what builds on it add updates as they arrive."""
    FedAvg.aggregate_train = aggregate_train  # type: ignore[method-assign]
    try:
        yield
    finally:
        FedAvg.aggregate_train = _STOCK_AGGREGATE  # type: ignore[method-assign]


def aggregate_train(
    self: FedAvg, server_round: int, replies: Iterable[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Stands in for `FedAvg.aggregate_train`."""
    if not can_stream(self):
        stock: tuple[ArrayRecord | None, MetricRecord | None] = _STOCK_AGGREGATE(self, server_round, replies)
        return stock
    mean = WeightedMean(self.weighted_by_key)
    outlines = [mean.add(reply) for reply in _drain_once(replies)]
    valid, _ = self._check_and_log_replies(outlines, is_train=True)
    if not valid:
        return None, None
    metrics = aggregate_metricrecords([message.content for message in valid], self.weighted_by_key)
    return mean.arrays(), metrics


def can_stream(strategy: FedAvg) -> bool:
    """Whether nothing of the strategy's own looks into the replies."""
    return (
        strategy.train_metrics_aggr_fn is aggregate_metricrecords
        and type(strategy)._check_and_log_replies is _STOCK_CHECKS  # noqa: SLF001
    )


class WeightedMean:
    """The mean of ArrayRecords, each weighted by a metric of its own reply."""

    def __init__(self, weighted_by: str) -> None:
        self._weighted_by = weighted_by
        self._total = 0.0
        self._keys: tuple[str, ...] | None = None
        self._sums: dict[str, _WeightedSum] = {}
        self._outline = ArrayRecord()

    def add(self, reply: Message) -> Message:
        """Add the arrays of *reply* in; what comes back is the reply without them.

        A reply that cannot be averaged is not added: its outline makes Flower's checks say why.
        """
        if reply.has_error():
            return reply
        weight, record = self._weight(reply.content), _single_array_record(reply.content)
        if weight is not None and record is not None and self._has_expected_keys(record):
            self._add(record, weight)
        return build_message(reply.metadata, content=self._outline_of(reply.content))

    def arrays(self) -> ArrayRecord:
        """The mean, as a record of arrays that are not copied again."""
        scale = 1.0 / self._total
        record = ArrayRecord()
        for key, one in self._sums.items():
            record[key] = one.scaled(scale)
        return record

    def _weight(self, content: RecordDict) -> float | None:
        metrics = next(iter(content.metric_records.values()), None)
        weight = None if metrics is None else metrics.get(self._weighted_by)
        return float(weight) if isinstance(weight, int | float) else None  # an int would wrap int8 arrays

    def _has_expected_keys(self, record: ArrayRecord) -> bool:
        self._keys = self._keys or tuple(record)
        return set(record) == set(self._keys)

    def _add(self, record: ArrayRecord, weight: float) -> None:
        self._total += weight
        for key, array in record.items():
            numbers = array_view(array)
            if key in self._sums:
                self._sums[key].add(numbers, weight)
            else:
                self._sums[key] = _WeightedSum(numbers, weight)

    def _outline_of(self, content: RecordDict) -> RecordDict:
        return RecordDict(
            {
                name: self._without_arrays(record) if isinstance(record, ArrayRecord) else record
                for name, record in content.items()
            }
        )

    def _without_arrays(self, record: ArrayRecord) -> ArrayRecord:
        """The keys of *record*; one object for all replies that have the same."""
        if tuple(record) != tuple(self._outline):
            self._outline = ArrayRecord(dict.fromkeys(record, _EMPTY_ARRAY))
        return self._outline


class _WeightedSum:
    """A weighted sum, in the precision that Flower's own would have, laid out as the .npy blob it will be."""

    def __init__(self, first: np.ndarray[Any, Any], weight: float) -> None:
        self._dtype = (np.empty(0, first.dtype) * 0.5).dtype  # Flower multiplies by a Python float
        summed_in = np.dtype(np.float32) if self._dtype == np.float16 else self._dtype
        header = npy.make_header(summed_in, first.shape)
        self._blob = bytearray(len(header) + first.size * summed_in.itemsize)
        self._blob[: len(header)] = header
        self._sum = np.frombuffer(self._blob, summed_in, offset=len(header)).reshape(first.shape)
        np.multiply(first, weight, out=self._sum, dtype=summed_in, casting="unsafe")

    def add(self, numbers: np.ndarray[Any, Any], weight: float) -> None:
        ours = self._sum
        if numbers.shape != ours.shape or numbers.dtype != ours.dtype or not numbers.flags.c_contiguous:
            ours += np.multiply(numbers, weight, dtype=np.result_type(ours, numbers))
        elif not _add_with_torch(ours, numbers, weight):
            _add_in_blocks(ours.reshape(-1), numbers.reshape(-1), weight)

    def scaled(self, scale: float) -> Array:
        self._sum *= scale
        if self._sum.dtype != self._dtype:
            return Array(np.asarray(self._sum.astype(self._dtype)))
        return BorrowedArray(str(self._dtype), self._sum.shape, NUMPY, memoryview(self._blob))


def _add_with_torch(ours: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any], weight: float) -> bool:
    """`ours += weight * numbers` in one pass and on all cores, where torch is there and may write."""
    torch = sys.modules.get("torch")
    if torch is None or not numbers.flags.writeable or ours.dtype not in (np.float32, np.float64):
        return False
    torch.from_numpy(ours).add_(torch.from_numpy(numbers), alpha=weight)
    return True


def _add_in_blocks(ours: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any], weight: float) -> None:
    step = max(1, BLOCK_BYTES // max(1, ours.itemsize))
    scratch = np.empty(min(step, ours.size), ours.dtype)
    for start in range(0, ours.size, step):
        block = ours[start : start + step]
        product = np.multiply(numbers[start : start + step], weight, out=scratch[: block.size])
        np.add(block, product, out=block)


def _single_array_record(content: RecordDict) -> ArrayRecord | None:
    """The ArrayRecord of *content*, if there is exactly one."""
    found = list(content.array_records.values())
    return found[0] if len(found) == 1 else None


def _drain_once(replies: Iterable[Message]) -> Iterable[Message]:
    """The replies, each to be seen once and then forgotten."""
    return replies.drain() if isinstance(replies, Replies) else replies
