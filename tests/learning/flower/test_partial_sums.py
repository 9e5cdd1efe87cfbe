"""Sums of updates that several processes make, against the same updates one by one."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedbus.learning.flower import record_codec
from fedbus.learning.flower.partial_sums import FlowerPartialSum, SummedReplies
from fedbus.learning.flower.private_api import build_message
from fedbus.learning.flower.replies import ReplyStream
from fedbus.learning.flower.streaming_aggregation import aggregate_train
from fedbus.learning.flower.update_sum import FlowerUpdateSum
from fedbus.learning.library import IncomingMessage
from fedbus.learning.stale_updates import UpdateRefused


def content(number: int, *, dtype: Any = np.float32, **metrics: Any) -> RecordDict:
    generator = np.random.default_rng(number)
    arrays = {
        "w": Array(generator.standard_normal(5).astype(dtype)),
        "b": Array(np.full(2, number, np.int64)),
    }
    values = {"loss": 1 / (number + 1), "num-examples": number + 1, **metrics}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(values)})


def message(number: int, records: RecordDict) -> Message:
    metadata = Metadata(1, f"m{number}", number + 2, 1, "r", "1", time.time(), 60.0, "train")
    return build_message(metadata, content=records)


def incoming(dtype: Any = np.float32) -> IncomingMessage:
    data = record_codec.encode(content(99, dtype=dtype)).to_bytes()
    return IncomingMessage(message_id="m", kind="train", data=data, cache={})


def in_sums(contents: list[RecordDict], *, processes: int, dtype: Any = np.float32) -> SummedReplies:
    """Return the replies as the Grid of a simulation gives them to the aggregation."""
    sums: list[FlowerPartialSum] = []

    def replies() -> Iterator[Message]:
        for process in range(processes):
            update_sum = FlowerUpdateSum("num-examples")
            for number in range(process, len(contents), processes):
                outline = update_sum.add(incoming(dtype), contents[number])
                if outline is not None:
                    decoded = record_codec.decode(record_codec.encode(outline).to_bytes())
                    yield message(number, decoded)
            payload = update_sum.take()
            if payload is not None:
                partial = FlowerPartialSum.unpack(payload.to_bytes())
                sums.append(partial)
                if partial.merged_count:
                    yield message(1000 + process, partial.merged_content())

    return SummedReplies(replies(), sums)


def assert_equal_means(contents: list[RecordDict], *, processes: int = 3, dtype: Any = np.float32) -> None:
    strategy = FedAvg()
    expected = aggregate_train(strategy, 1, ReplyStream(message(i, one) for i, one in enumerate(contents)))
    actual = aggregate_train(strategy, 1, in_sums(contents, processes=processes, dtype=dtype))
    assert expected[0] is not None
    assert actual[0] is not None
    for name, array in expected[0].items():
        assert actual[0][name].dtype == array.dtype
        np.testing.assert_allclose(
            actual[0][name].numpy(), array.numpy(), rtol=2e-3 if dtype == np.float16 else 1e-5
        )
    assert expected[1] is not None
    assert actual[1] is not None
    assert set(actual[1]) == set(expected[1])
    for key, value in expected[1].items():
        assert actual[1][key] == pytest.approx(value)


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_mean_is_that_of_the_updates_one_by_one(processes: int, dtype: Any) -> None:
    contents = [content(number, dtype=dtype, accuracy=number / 7) for number in range(7)]
    assert_equal_means(contents, processes=processes, dtype=dtype)


def test_metrics_that_are_lists_keep_a_message_of_their_own() -> None:
    assert_equal_means([content(number, histogram=[1.0, float(number)]) for number in range(5)])


def test_records_besides_arrays_and_metrics_keep_a_message_of_their_own() -> None:
    contents = [content(number) for number in range(5)]
    contents[2]["extra"] = ConfigRecord({"note": "x"})
    assert_equal_means(contents)


def test_flower_rejects_replies_with_other_metrics_as_it_does_without_sums() -> None:
    contents = [content(number) for number in range(4)]
    contents[3] = content(3, another=1.0)
    with pytest.raises(Exception, match="same keys"):
        aggregate_train(FedAvg(), 1, in_sums(contents, processes=2))


def test_flower_counts_all_replies_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.INFO):
        aggregate_train(FedAvg(), 1, in_sums([content(number) for number in range(7)], processes=2))
    assert "aggregate_train: Received 7 results and 0 failures" in caplog.text


def test_an_update_with_nan_or_another_shape_is_refused() -> None:
    update_sum = FlowerUpdateSum("num-examples")
    bad = content(1)
    bad["arrays"] = ArrayRecord(
        {"w": Array(np.full(5, np.nan, np.float32)), "b": Array(np.zeros(2, np.int64))}
    )
    with pytest.raises(UpdateRefused, match="NaN"):
        update_sum.add(incoming(), bad)
    bad["arrays"] = ArrayRecord({"w": Array(np.zeros(4, np.float32)), "b": Array(np.zeros(2, np.int64))})
    with pytest.raises(UpdateRefused, match="shape"):
        update_sum.add(incoming(), bad)
    assert update_sum.take() is None
