"""The sum of the updates of several clients in one process, for strategies that only need the weighted mean.

The sums of all processes make the same mean as the updates one by one, except for the rounding of floats.
"""

from flwr.app import ArrayRecord, RecordDict

from fedbus.learning.flower import record_codec
from fedbus.learning.flower.array_records import array_records_of
from fedbus.learning.flower.compressed_records import decode_updates, has_compressed_arrays
from fedbus.learning.flower.partial_sums import FlowerPartialSum
from fedbus.learning.flower.streaming_aggregation import WeightedMean
from fedbus.learning.flower.update_check import check_update
from fedbus.learning.library import IncomingMessage
from fedbus.learning.payload import Payload


class FlowerUpdateSum:
    """A sum of updates, each multiplied by its metric *weighted_by*."""

    def __init__(self, weighted_by: str) -> None:
        self._weighted_by = weighted_by
        self._mean = WeightedMean(weighted_by)

    def add(self, message: IncomingMessage, content: RecordDict) -> RecordDict:
        """Add the update in *content*, the reply to *message*, and return *content* with empty arrays.

        Content that cannot be averaged is not added. The strategy's checks reject it, as they do without sums.

        Raises:
            UpdateRefused: an array has NaN or infinity, or another shape than in the message.
            BadEncoding: a compressed update is invalid.

        """
        sent = _sent_arrays(message)
        if has_compressed_arrays(content):
            decode_updates(content, sent)
        check_update(content, sent)
        return self._mean.add_content(content)

    def take(self) -> Payload | None:
        """Return the sum and its weight, and begin a new sum; None if nothing was added."""
        mean, self._mean = self._mean, WeightedMean(self._weighted_by)
        if mean.is_empty:
            return None
        return FlowerPartialSum(mean.sums(), mean.total_weight, mean.dtypes()).pack()


def _sent_arrays(message: IncomingMessage) -> dict[str, ArrayRecord]:
    decoded = None if message.cache is None else message.cache.get("content")
    if decoded is None:
        decoded = record_codec.decode(message.data)
    return array_records_of(decoded)
