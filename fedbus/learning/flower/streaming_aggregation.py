"""Streaming aggregation: each update is added on arrival, so that memory does not grow with the cohort.

Flower's FedAvg collects all replies and then averages them. `streaming_aggregation` replaces
`FedAvg.aggregate_train` in the ServerApp's process. The replacement adds the arrays of each reply to one
accumulator and releases them. Flower's own code still computes metrics, checks and logs, from the replies
without arrays.

It serves Flower's own strategies that only need the mean (FedAvg, FedProx, FedAvgM, FedAdam and its relatives) in
Flower's own loop: `allows_streaming`. Every other strategy and loop, which may read the replies again, sort them or
read their arrays, gets a list of all replies and Flower's code.

The decision is in docs/decisions/0003-streaming-aggregation.md.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from fedbus.learning import npy
from fedbus.learning.flower.array_records import single_array_record
from fedbus.learning.flower.partial_sums import FlowerPartialSum, SummedReplies
from fedbus.learning.flower.private_api import (
    NUMPY,
    BorrowedArray,
    aggregate_metricrecords,
    array_view,
    build_message,
    check_replies,
    checks_replies_as_flower,
)
from fedbus.learning.flower.replies import ReplyStream, update_weight

BLOCK_BYTES: Final = 512 * 1024
"""Size of a block that is multiplied and then added, small enough for the CPU cache."""

_MEAN_STRATEGIES: Final = frozenset({FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi})
"""Flower's classes whose `aggregate_train` is FedAvg's, or passes the replies to it and does not read them."""

_STOCK_AGGREGATE = FedAvg.aggregate_train
_EMPTY_ARRAY = Array("", (), "", b"")


@contextmanager
def streaming_aggregation() -> Iterator[None]:
    """Replace `FedAvg.aggregate_train` until the block ends."""
    FedAvg.aggregate_train = aggregate_train  # type: ignore[method-assign]
    try:
        yield
    finally:
        FedAvg.aggregate_train = _STOCK_AGGREGATE  # type: ignore[method-assign]


def aggregate_train(
    self: FedAvg, server_round: int, replies: Iterable[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Replace `FedAvg.aggregate_train`: aggregate a `ReplyStream`, and leave a list to Flower's code."""
    if not isinstance(replies, ReplyStream):
        result: tuple[ArrayRecord | None, MetricRecord | None] = _STOCK_AGGREGATE(self, server_round, replies)
        return result
    mean = WeightedMean(self.weighted_by_key, is_deterministic=replies.is_deterministic)
    if isinstance(replies, SummedReplies):
        outlines = list(replies)
        for partial in replies.sums:
            mean.add_sum(partial)
        hidden = sum(max(0, partial.merged_count - 1) for partial in replies.sums)
    else:
        outlines = [mean.add(reply) for reply in replies]
        hidden = 0
    valid = check_replies(self, outlines, hidden=hidden)
    if not valid:
        return None, None
    metrics = aggregate_metricrecords([message.content for message in valid], self.weighted_by_key)
    return mean.arrays(), metrics


def allows_streaming(strategy: object) -> bool:
    """Return whether *strategy* passes its replies only to FedAvg's mean, and has no other code that reads them."""
    owner = next((cls for cls in type(strategy).__mro__ if "aggregate_train" in vars(cls)), None)
    return (
        isinstance(strategy, FedAvg)
        and owner in _MEAN_STRATEGIES
        and "aggregate_train" not in vars(strategy)
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
        and checks_replies_as_flower(strategy)
    )


class WeightedMean:
    """The mean of ArrayRecords, each weighted by the metric *weighted_by* of its reply.

    *is_deterministic*: the same replies in the same order give the same bits in each process. torch, which is faster,
    rounds once for a product and its sum, NumPy twice; and not each process has loaded it.
    """

    def __init__(self, weighted_by: str, *, is_deterministic: bool = False) -> None:
        self._weighted_by = weighted_by
        self._uses_torch = not is_deterministic
        self._total = 0.0
        self._keys: tuple[str, ...] | None = None
        self._sums: dict[str, _WeightedSum] = {}
        self._outline = ArrayRecord()

    def add(self, reply: Message) -> Message:
        """Add the arrays of *reply*, and return the reply with empty arrays.

        A reply that cannot be averaged is not added; Flower's checks reject the returned reply.
        """
        if reply.has_error():
            return reply
        self.add_content(reply.content)
        return build_message(reply.metadata, content=self.outline_of(reply.content))

    def add_content(self, content: RecordDict) -> None:
        """Add the arrays of *content*."""
        weight = update_weight(content, self._weighted_by)
        record = single_array_record(content)
        if weight is not None and record is not None and self._has_expected_keys(record):
            self._add(record, weight)

    def add_sum(self, partial: FlowerPartialSum) -> None:
        """Add the sum of several updates. One with other names than the first is not added, as with an update."""
        if self._has_expected_keys(partial.arrays):
            self._total += partial.weight
            for key, array in partial.arrays.items():
                self._add_array(key, array_view(array), 1.0, partial.dtypes.get(key))

    def has_keys_of(self, record: ArrayRecord) -> bool:
        """Return whether *record* has the names of the arrays in the sum."""
        return self._keys is not None and tuple(record) == self._keys

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return not self._sums

    @property
    def total_weight(self) -> float:
        return self._total

    def sums(self) -> ArrayRecord:
        """Return the sum of the weighted arrays, which are not copied."""
        record = ArrayRecord()
        for key, weighted_sum in self._sums.items():
            record[key] = weighted_sum.array()
        return record

    def dtypes(self) -> dict[str, str]:
        """Return the dtypes of the mean, of the arrays that are summed in another one."""
        return {key: str(one.dtype) for key, one in self._sums.items() if one.dtype != one.array().dtype}

    def arrays(self) -> ArrayRecord:
        """Return the mean. The arrays of the record are not copied."""
        scale = 1.0 / self._total
        record = ArrayRecord()
        for key, weighted_sum in self._sums.items():
            record[key] = weighted_sum.scaled(scale)
        return record

    def _has_expected_keys(self, record: ArrayRecord) -> bool:
        self._keys = self._keys or tuple(record)
        return set(record) == set(self._keys)

    def _add(self, record: ArrayRecord, weight: float) -> None:
        self._total += weight
        for key, array in record.items():
            self._add_array(key, array_view(array), weight)

    def _add_array(
        self, key: str, values: np.ndarray[Any, Any], weight: float, dtype: str | None = None
    ) -> None:
        if key in self._sums:
            self._sums[key].add(values, weight, uses_torch=self._uses_torch)
        else:
            self._sums[key] = _WeightedSum(values, weight, dtype)

    def outline_of(self, content: RecordDict) -> RecordDict:
        """Return *content* with empty arrays."""
        return RecordDict(
            {
                name: self._without_arrays(record) if isinstance(record, ArrayRecord) else record
                for name, record in content.items()
            }
        )

    def _without_arrays(self, record: ArrayRecord) -> ArrayRecord:
        """Return a record with the keys of *record* and empty arrays, the same object for equal keys."""
        if tuple(record) != tuple(self._outline):
            self._outline = ArrayRecord(dict.fromkeys(record, _EMPTY_ARRAY))
        return self._outline


class _WeightedSum:
    """A weighted sum in the dtype of Flower's own aggregation, stored as the .npy bytes of the result.

    float16 is summed in float32.
    """

    def __init__(self, first: np.ndarray[Any, Any], weight: float, dtype: str | None = None) -> None:
        mean_dtype = (np.empty(0, first.dtype) * 0.5).dtype  # Flower multiplies by a Python float
        self.dtype = np.dtype(dtype or mean_dtype)
        """The dtype of the mean."""
        sum_dtype = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype
        header = npy.make_header(sum_dtype, first.shape)
        self._blob = bytearray(len(header) + first.size * sum_dtype.itemsize)
        self._blob[: len(header)] = header
        self._sum = np.frombuffer(self._blob, sum_dtype, offset=len(header)).reshape(first.shape)
        np.multiply(first, weight, out=self._sum, dtype=sum_dtype, casting="unsafe")

    def add(self, values: np.ndarray[Any, Any], weight: float, *, uses_torch: bool) -> None:
        total = self._sum
        if values.shape != total.shape or values.dtype != total.dtype or not values.flags.c_contiguous:
            total += np.multiply(values, weight, dtype=np.result_type(total, values))
        elif not (uses_torch and _add_with_torch(total, values, weight)):
            _add_in_blocks(total.reshape(-1), values.reshape(-1), weight)

    def scaled(self, scale: float) -> Array:
        """Multiply the sum by *scale* in place, and return it."""
        self._sum *= scale
        if self._sum.dtype != self.dtype:
            return Array(np.asarray(self._sum.astype(self.dtype)))
        return self.array()

    def array(self) -> BorrowedArray:
        """Return the sum as it is."""
        return BorrowedArray(str(self._sum.dtype), self._sum.shape, NUMPY, memoryview(self._blob))


def _add_with_torch(total: np.ndarray[Any, Any], values: np.ndarray[Any, Any], weight: float) -> bool:
    """Compute `total += weight * values` in one pass on all cores; False if torch is not loaded or cannot."""
    torch = sys.modules.get("torch")
    if torch is None or not values.flags.writeable or total.dtype not in (np.float32, np.float64):
        return False  # torch.from_numpy warns about an array that is not writeable
    torch.from_numpy(total).add_(torch.from_numpy(values), alpha=weight)
    return True


def _add_in_blocks(total: np.ndarray[Any, Any], values: np.ndarray[Any, Any], weight: float) -> None:
    step = max(1, BLOCK_BYTES // max(1, total.itemsize))
    scratch = np.empty(min(step, total.size), total.dtype)
    for start in range(0, total.size, step):
        block = total[start : start + step]
        product = np.multiply(values[start : start + step], weight, out=scratch[: block.size])
        np.add(block, product, out=block)
