"""Sums of updates that the processes of the clients have made, on the server side."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedbus.learning.flower import record_codec
from fedbus.learning.flower.replies import ReplyStream, StreamedMessages
from fedbus.learning.payload import Payload

SUM: Final = "sum"
VALUES: Final = "values"
DTYPES: Final = "dtypes"
MEAN_METRICS: Final = "mean-metrics"
EMPTY_ARRAY: Final = Array("", (), "", b"")


@dataclass(frozen=True)
class MergedReplies:
    """Several replies as one, for Flower's checks and its mean of metrics."""

    count: int
    arrays_name: str
    """The name of the ArrayRecord in each of them."""
    metrics_name: str
    """The name of the MetricRecord in each of them."""
    metrics: MetricRecord
    """The weighted means, and the sum of the weights as the weight."""


@dataclass(frozen=True)
class FlowerPartialSum:
    """The weighted sum of several updates."""

    arrays: ArrayRecord
    weight: float
    """The sum of the weights."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The dtypes of the mean, for arrays that are summed in another one."""
    merged: MergedReplies | None = None
    """The replies that have no message of their own; None: there are none."""

    @property
    def merged_count(self) -> int:
        return 0 if self.merged is None else self.merged.count

    def merged_content(self) -> RecordDict:
        """Return the content of `merged`, with empty arrays."""
        assert self.merged is not None
        arrays = ArrayRecord(dict.fromkeys(self.arrays, EMPTY_ARRAY))
        return RecordDict({self.merged.arrays_name: arrays, self.merged.metrics_name: self.merged.metrics})

    def pack(self) -> Payload:
        values: dict[str, float | int | str] = {"weight": self.weight}
        records = RecordDict({SUM: self.arrays, DTYPES: ConfigRecord(dict(self.dtypes))})
        if (merged := self.merged) is not None:
            values |= {"count": merged.count, "arrays": merged.arrays_name, "metrics": merged.metrics_name}
            records[MEAN_METRICS] = merged.metrics
        records[VALUES] = ConfigRecord(dict(values))
        return Payload.pack(record_codec.encode(records).buffers, as_blob=True)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "FlowerPartialSum":
        records = record_codec.decode(data)
        values: dict[str, Any] = dict(records.config_records[VALUES])
        dtypes = {key: str(dtype) for key, dtype in records.config_records[DTYPES].items()}
        merged = None
        if "count" in values:
            metrics = records.metric_records[MEAN_METRICS]
            merged = MergedReplies(values["count"], values["arrays"], values["metrics"], metrics)
        return cls(records.array_records[SUM], float(values["weight"]), dtypes, merged)


class SummableMessages(StreamedMessages):
    """Messages whose updates may be added up where the clients are, each multiplied by its metric *weighted_by*.

    Where that is possible, `MessengerGrid.send_and_receive` returns `SummedReplies` for them.
    """

    def __init__(self, messages: Iterable[Message], *, weighted_by: str) -> None:
        super().__init__(messages)
        self.weighted_by = weighted_by


class SummedReplies(ReplyStream):
    """Replies with empty arrays, whose updates are in *sums*, which is complete after the last reply.

    Replies that have no message of their own are one: `MergedReplies`.
    """

    def __init__(self, replies: Iterable[Message], sums: list[FlowerPartialSum]) -> None:
        super().__init__(replies)
        self.sums = sums
