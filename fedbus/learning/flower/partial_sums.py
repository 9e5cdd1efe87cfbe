"""Sums of updates that the processes of the clients have made, on the server side."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedbus.learning.flower import record_codec
from fedbus.learning.flower.replies import ReplyStream, StreamedMessages
from fedbus.learning.payload import Payload

SUM: Final = "sum"
WEIGHT: Final = "weight"
DTYPES: Final = "dtypes"


@dataclass(frozen=True)
class FlowerPartialSum:
    """The weighted sum of several updates."""

    arrays: ArrayRecord
    weight: float
    """The sum of the weights."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The dtypes of the mean, for arrays that are summed in another one."""

    def pack(self) -> Payload:
        records = RecordDict(
            {
                SUM: self.arrays,
                WEIGHT: MetricRecord({WEIGHT: self.weight}),
                DTYPES: ConfigRecord(dict(self.dtypes)),
            }
        )
        return Payload.pack(record_codec.encode(records).buffers, as_blob=True)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "FlowerPartialSum":
        records = record_codec.decode(data)
        weight = records.metric_records[WEIGHT][WEIGHT]
        assert isinstance(weight, int | float)
        dtypes = {key: str(dtype) for key, dtype in records.config_records[DTYPES].items()}
        return cls(records.array_records[SUM], float(weight), dtypes)


class SummableMessages(StreamedMessages):
    """Messages whose updates may be added up where the clients are, each multiplied by its metric *weighted_by*.

    Where that is possible, `MessengerGrid.send_and_receive` returns `SummedReplies` for them.
    """

    def __init__(self, messages: Iterable[Message], *, weighted_by: str) -> None:
        super().__init__(messages)
        self.weighted_by = weighted_by


class SummedReplies(ReplyStream):
    """Replies with empty arrays, whose updates are in *sums*, which is complete after the last reply."""

    def __init__(self, replies: Iterable[Message], sums: list[FlowerPartialSum]) -> None:
        super().__init__(replies)
        self.sums = sums
