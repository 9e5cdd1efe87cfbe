"""The sum of the updates of several clients in one process, for strategies that only need the weighted mean.

The sums of all processes make the same mean as the updates one by one, except for the rounding of floats. The metrics
of replies of the same form are added up, too, so that the server side needs no message for each of them.
"""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedbus.learning.flower import record_codec
from fedbus.learning.flower.array_records import array_records_of
from fedbus.learning.flower.compressed_records import decode_updates, has_compressed_arrays
from fedbus.learning.flower.partial_sums import FlowerPartialSum, MergedReplies
from fedbus.learning.flower.streaming_aggregation import WeightedMean
from fedbus.learning.flower.update_check import check_update
from fedbus.learning.library import IncomingMessage
from fedbus.learning.payload import Payload


class FlowerUpdateSum:
    """A sum of updates, each multiplied by its metric *weighted_by*."""

    def __init__(self, weighted_by: str) -> None:
        self._weighted_by = weighted_by
        self._mean = WeightedMean(weighted_by)
        self._metrics: _MetricsSum | None = None

    def add(self, message: IncomingMessage, content: RecordDict) -> RecordDict | None:
        """Add the update in *content*, the reply to *message*.

        Return None if all of *content* is in the sum, else *content* with empty arrays: it has another form than the
        first one, or cannot be averaged. Then the strategy's checks decide, as they do without sums.

        Raises:
            UpdateRefused: an array has NaN or infinity, or another shape than in the message.
            BadEncoding: a compressed update is invalid.

        """
        sent = _sent_arrays(message)
        if has_compressed_arrays(content):
            decode_updates(content, sent)
        check_update(content, sent)
        self._mean.add_content(content)
        return None if self._merge(content) else self._mean.outline_of(content)

    def take(self) -> Payload | None:
        """Return the sum and its weight, and begin a new sum; None if nothing was added."""
        mean, self._mean = self._mean, WeightedMean(self._weighted_by)
        metrics, self._metrics = self._metrics, None
        if mean.is_empty:
            return None
        merged = None if metrics is None else metrics.merged(self._weighted_by)
        return FlowerPartialSum(mean.sums(), mean.total_weight, mean.dtypes(), merged).pack()

    def _merge(self, content: RecordDict) -> bool:
        """Add the metrics of *content*, if it has the form of the first one. Return whether it has."""
        if len(content) != 2:
            return False
        (first_name, first), (second_name, second) = content.items()
        if isinstance(first, MetricRecord):
            first_name, first, second_name, second = second_name, second, first_name, first
        if not (isinstance(first, ArrayRecord) and isinstance(second, MetricRecord)):
            return False
        weight = second.get(self._weighted_by)
        if not isinstance(weight, int | float) or not self._mean.has_keys_of(first):
            return False
        form = (first_name, second_name, tuple(second))
        if self._metrics is None:
            self._metrics = _MetricsSum(form)
        return self._metrics.form == form and self._metrics.add(second, float(weight))


@dataclass
class _MetricsSum:
    """The weighted sum of metrics."""

    form: tuple[str, str, tuple[str, ...]]
    """The names of the ArrayRecord and of the MetricRecord, and those of the metrics."""
    count: int = 0
    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: MetricRecord, weight: float) -> bool:
        """Add *metrics* of the same names. Return False if one of them is a list: then nothing is added."""
        values = [value for value in metrics.values() if isinstance(value, int | float)]
        if len(values) != len(self.form[2]):
            return False
        for name, value in zip(self.form[2], values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.count += 1
        self.weight += weight
        return True

    def merged(self, weighted_by: str) -> MergedReplies | None:
        if not self.count:
            return None
        means = {name: total / self.weight if self.weight else 0.0 for name, total in self.sums.items()}
        metrics = MetricRecord({**means, weighted_by: self.weight})
        return MergedReplies(self.count, self.form[0], self.form[1], metrics)


def _sent_arrays(message: IncomingMessage) -> dict[str, ArrayRecord]:
    decoded = None if message.cache is None else message.cache.get("content")
    if decoded is None:
        decoded = record_codec.decode(message.data)
    return array_records_of(decoded)
