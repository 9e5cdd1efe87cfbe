"""Streaming aggregation equals Flower's aggregation, and keeps few updates in memory."""

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.learning.flower import record_codec
from fedbus.learning.flower import streaming_aggregation as streaming
from fedbus.learning.flower.private_api import build_message
from fedbus.learning.flower.replies import ReplyStream
from fedbus.learning.flower.streaming_aggregation import streaming_aggregation

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.bool_, np.complex64)


def reply(content: RecordDict | Error, node: int = 5) -> Message:
    metadata = Metadata(1, "m", node, 1, "q", "1", time.time(), 60.0, "train")
    if isinstance(content, Error):
        return build_message(metadata, error=content)
    return build_message(
        metadata, content=record_codec.decode(bytearray(record_codec.encode(content).to_bytes()))
    )


def arrays(seed: int, dtypes: tuple[Any, ...] = DTYPES) -> ArrayRecord:
    random = np.random.default_rng(seed)
    named = {f"{np.dtype(dtype)}": (random.random((300, 5)) * 10).astype(dtype) for dtype in dtypes}
    named["scalar"] = np.asarray(random.random(), dtypes[0])
    named["turned"] = np.asfortranarray((random.random((3, 4)) * 10).astype(dtypes[0]))
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in named.items()})


def update(seed: int, weight: float, **options: Any) -> RecordDict:
    metrics = MetricRecord({"num-examples": weight, "loss": float(seed), "list": [1.0, float(seed)]})
    return RecordDict({"arrays": arrays(seed, **options), "metrics": metrics})


def aggregate_both_ways(
    make: Callable[[], FedAvg], replies: Callable[[], list[Message]], rounds: int = 1
) -> tuple[Any, Any]:
    """Aggregate the same replies without and with streaming."""

    def run() -> Any:
        strategy, outcome = make(), None
        for number in range(1, rounds + 1):
            if hasattr(strategy, "current_arrays"):
                start = arrays(99, FLOATS)
                keep = isinstance(strategy, FedAvgM)
                strategy.current_arrays = start if keep else {k: a.numpy() for k, a in start.items()}
            messages = replies()
            streams = streaming.allows_streaming(strategy)
            outcome = strategy.aggregate_train(number, ReplyStream(messages) if streams else messages)
        return outcome

    stock = run()
    with streaming_aggregation():
        return stock, run()


FLOATS = (np.float32, np.float64)


def assert_same(stock: Any, streamed: Any) -> None:
    (stock_arrays, stock_metrics), (streamed_arrays, streamed_metrics) = stock, streamed
    assert list(stock_arrays) == list(streamed_arrays)
    for name, array in stock_arrays.items():
        streamed_array = streamed_arrays[name]
        assert (streamed_array.dtype, streamed_array.shape, streamed_array.stype) == (
            array.dtype,
            array.shape,
            array.stype,
        ), name
        expected = array.numpy()
        # Flower sums float16 in float16, with an error of half a unit in the last place for each operation
        tolerance = 4e-3 if "16" in array.dtype else 1e-5
        largest = float(np.abs(expected).max(initial=0))
        np.testing.assert_allclose(
            streamed_array.numpy(), expected, rtol=tolerance, atol=tolerance * largest, err_msg=name
        )
    assert stock_metrics == streamed_metrics


@pytest.mark.parametrize("with_torch", [True, False], ids=["torch", "numpy alone"])
@pytest.mark.parametrize("block_bytes", [64, 512 * 1024])
def test_the_mean_equals_flowers_for_every_dtype(
    monkeypatch: pytest.MonkeyPatch, with_torch: bool, block_bytes: int
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block_bytes)
    if not with_torch:
        monkeypatch.setattr(streaming, "_add_with_torch", lambda *_: False)
    assert_same(*aggregate_both_ways(FedAvg, lambda: [reply(update(seed, 10 + seed)) for seed in range(4)]))


@given(st.lists(st.integers(1, 10_000) | st.floats(0.01, 100), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_mean_equals_flowers_for_every_weight(weights: list[float]) -> None:
    kind = type(weights[0])
    assert_same(
        *aggregate_both_ways(
            FedAvg, lambda: [reply(update(n, kind(weight))) for n, weight in enumerate(weights)]
        )
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedProx(proximal_mu=0.5),
        lambda: FedAdam(eta=0.1),
        lambda: FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
        FedMedian,
        lambda: FedAvg(train_metrics_aggr_fn=lambda records, _: MetricRecord({"n": float(len(records))})),
    ],
    ids=["FedProx", "FedAdam", "FedAvgM", "FedMedian", "own metrics"],
)
def test_strategies_based_on_fedavg_give_the_same_result(make: Callable[[], FedAvg]) -> None:
    assert_same(
        *aggregate_both_ways(
            make, lambda: [reply(update(n, 1 + n, dtypes=FLOATS)) for n in range(4)], rounds=2
        )
    )


class Checking(FedAvg):
    def _check_and_log_replies(self, *args: Any, **options: Any) -> Any:
        return super()._check_and_log_replies(*args, **options)


class Aggregating(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return super().aggregate_train(server_round, replies)


class Configuring(FedAvg):
    def configure_train(self, *args: Any) -> Any:
        return super().configure_train(*args)


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [
        (FedAvg(), True),
        (FedProx(proximal_mu=0.5), True),
        (FedAdam(eta=0.1), True),
        (FedAvgM(), True),
        (Configuring(), True),
        (FedMedian(), False),
        (Checking(), False),
        (Aggregating(), False),
        (FedAvg(train_metrics_aggr_fn=lambda *_: MetricRecord()), False),
        (DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_strategies_that_take_the_mean_stream(strategy: object, allowed: bool) -> None:
    assert streaming.allows_streaming(strategy) is allowed


def test_a_list_of_replies_is_left_to_flowers_code() -> None:
    replies = [reply(update(seed, 1)) for seed in range(3)]
    with streaming_aggregation():
        FedAvg().aggregate_train(1, replies)
    shapes = [message.content.array_records["arrays"]["float32"].shape for message in replies]
    assert shapes == [(300, 5)] * 3


def test_error_replies_are_left_out() -> None:
    replies = lambda: [reply(Error(2, "oh")), reply(update(1, 3)), reply(Error(2, "oh"))]  # noqa: E731
    assert_same(*aggregate_both_ways(FedAvg, replies))


def test_without_updates_there_is_no_result() -> None:
    assert aggregate_both_ways(FedAvg, list) == ((None, None), (None, None))
    assert aggregate_both_ways(FedAvg, lambda: [reply(Error(2, "oh"))]) == ((None, None), (None, None))


def make_broken_reply(name: str) -> list[Message]:
    good: Any = update(1, 3)
    bad: Any = update(2, 3)
    match name:
        case "other arrays":
            del bad["arrays"]["float32"]
        case "no arrays":
            del bad["arrays"]
        case "two records of arrays":
            bad["more"] = arrays(3)
        case "no metrics":
            del bad["metrics"]
        case "other metrics":
            bad["metrics"]["extra"] = 1.0
        case "no weight":
            del good["metrics"]["num-examples"], bad["metrics"]["num-examples"]
        case "a list for a weight":
            bad["metrics"]["num-examples"] = [1]
        case "no weight at all":
            good["metrics"]["num-examples"] = bad["metrics"]["num-examples"] = 0
        case "another shape":
            bad["arrays"]["float32"] = Array(np.zeros((7, 7), np.float32))
        case _:
            pass
    return [reply(good), reply(bad)]


@pytest.mark.parametrize(
    "name",
    [
        "other arrays",
        "no arrays",
        "two records of arrays",
        "no metrics",
        "other metrics",
        "no weight",
        "a list for a weight",
        "no weight at all",
        "another shape",
    ],
)
def test_inconsistent_replies_raise_the_same_error_as_flower(name: str) -> None:
    errors = (InconsistentMessageReplies, ZeroDivisionError, ValueError)
    with pytest.raises(errors) as stock:
        FedAvg().aggregate_train(1, make_broken_reply(name))
    with streaming_aggregation(), pytest.raises(errors) as streamed:
        FedAvg().aggregate_train(1, ReplyStream(make_broken_reply(name)))

    assert streamed.type is stock.type
    if stock.type is InconsistentMessageReplies:
        assert str(streamed.value) == str(stock.value)


def test_at_most_two_updates_are_in_memory() -> None:
    alive: weakref.WeakSet[Message] = weakref.WeakSet()
    most = 0

    def arriving() -> Iterator[Message]:
        nonlocal most
        for seed in range(12):
            message = reply(update(seed, 1, dtypes=FLOATS), node=seed)
            alive.add(message)
            most = max(most, sum(1 for message in alive if message.has_content()))
            yield message
            del message

    gc.collect()
    with streaming_aggregation():
        FedAvg().aggregate_train(1, ReplyStream(arriving()))
    assert most <= 2


@pytest.mark.parametrize("is_writeable", [True, False], ids=["writeable", "read-only"])
def test_a_deterministic_mean_does_not_depend_on_torch(
    monkeypatch: pytest.MonkeyPatch, *, is_writeable: bool
) -> None:
    """torch rounds a product and its sum once, and cannot add arrays that are read-only."""
    pytest.importorskip("torch")

    def mean() -> list[bytes]:
        replies = [reply(update(seed, 0.1 + seed, dtypes=(np.float32,))) for seed in range(4)]
        if not is_writeable:
            for one in replies:
                for array in one.content.array_records["arrays"].values():
                    array.numpy().flags.writeable = False
        strategy = FedAvg()
        with streaming_aggregation():
            result, _ = strategy.aggregate_train(1, ReplyStream(replies, is_deterministic=True))
        assert result is not None
        return [array.numpy().tobytes() for array in result.values()]

    with_torch = mean()
    monkeypatch.setitem(sys.modules, "torch", None)

    assert mean() == with_torch


def test_flowers_aggregation_is_restored_afterwards() -> None:
    stock = FedAvg.aggregate_train
    with streaming_aggregation():
        assert FedAvg.aggregate_train is not stock
    assert FedAvg.aggregate_train is stock


def test_the_result_is_sent_without_a_copy() -> None:
    with streaming_aggregation():
        mean, _ = FedAvg().aggregate_train(1, ReplyStream([reply(update(1, 3))]))
    assert mean is not None
    encoded = record_codec.encode(RecordDict({"arrays": mean, "config": ConfigRecord()}))
    assert any(isinstance(buffer.obj, bytearray) for buffer in encoded.buffers)
