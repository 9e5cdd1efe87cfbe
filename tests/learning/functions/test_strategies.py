"""Each strategy gives the result of Flower's own strategy for the same updates."""

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from fedbus.contracts.task.aggregation import AggregationTable
from fedbus.learning.flower.private_api import set_process_identity
from fedbus.learning.functions.strategies import (
    BLOCK_ELEMENTS,
    AggregationStrategy,
    FedAdam,
    FedAvg,
    FedMedian,
    MultiKrum,
    RunningMean,
    TrimmedMean,
    make_strategy,
    squared_distances,
    to_dtype,
)
from fedbus.learning.functions.updates import Update, Weights

Round = tuple[Weights, list[Update]]


@st.composite
def rounds(draw: st.DrawFn, max_rounds: int = 1, min_updates: int = 1) -> list[list[Update]]:
    """Rounds of updates with the same names, shapes and dtypes, of random normal values."""
    shapes = draw(
        st.lists(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), min_size=1, max_size=4)
    )
    dtypes = [draw(st.sampled_from([np.float32, np.float64])) for _ in shapes]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))

    def make_weights() -> Weights:
        return {
            f"w{number}": np.asarray(random.normal(scale=scale, size=shape), dtype=dtype)
            for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        }

    return [
        [
            Update(f"c{number}", make_weights(), examples, weight=float(examples))
            for number, examples in enumerate(
                draw(st.lists(st.integers(1, 10_000), min_size=min_updates, max_size=9))
            )
        ]
        for _ in range(draw(st.integers(1, max_rounds)))
    ]


def start_weights(updates: list[Update]) -> Weights:
    return {name: np.full_like(array, 0.5) for name, array in updates[0].weights.items()}


def to_reply(update: Update) -> Message:
    set_process_identity(1)
    request = Message(content=RecordDict(), dst_node_id=1, message_type="train")
    request.metadata.__dict__["_message_id"] = update.client
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in update.weights.items()}),
            "metrics": MetricRecord({"num-examples": update.num_examples}),
        }
    )
    return Message(content=content, reply_to=request)


def aggregate_with_flower(strategy: Any, weights: Weights, rounds: list[list[Update]]) -> Weights:
    for number, updates in enumerate(rounds, start=1):
        record = ArrayRecord({name: Array(array) for name, array in weights.items()})
        strategy.current_arrays = {name: array.numpy() for name, array in record.items()}
        arrays, _ = strategy.aggregate_train(number, [to_reply(update) for update in updates])
        weights = {name: array.numpy() for name, array in arrays.items()}
    return weights


def aggregate(strategy: AggregationStrategy, weights: Weights, rounds: list[list[Update]]) -> Weights:
    for updates in rounds:
        strategy.begin_round(weights)
        for update in updates:
            strategy.add(update)
        result = strategy.end_round()
        assert result is not None
        weights = result
    return weights


def assert_same(
    ours: Weights, theirs: Weights, sizes: Mapping[str, float], *, rtol: float = 1e-5, scale: float = 1.0
) -> None:
    """Compare with a tolerance for updates of these *sizes*: Flower's rounding errors have theirs, not the mean's."""
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].shape == array.shape
        size = max(1e-6, float(np.abs(array).max(initial=0.0)), sizes[name])
        np.testing.assert_allclose(ours[name], array, rtol=rtol, atol=1e-6 * size * scale)


# --- compared with Flower -------------------------------------------------------------------------


def check(ours: AggregationStrategy, theirs: Any, rounds: list[list[Update]], **tolerance: float) -> None:
    start = start_weights(rounds[0])
    result = aggregate(ours, start, rounds)
    updates = [update.weights for updates in rounds for update in updates]
    sizes = {
        name: max(float(np.abs(weights[name]).max(initial=0.0)) for weights in updates) for name in result
    }
    assert_same(result, aggregate_with_flower(theirs, start, rounds), sizes, **tolerance)
    assert all(result[name].dtype == array.dtype for name, array in start.items())


@given(rounds())
def test_fedavg_is_flowers(rounds: list[list[Update]]) -> None:
    check(FedAvg(), flower.FedAvg(), rounds, scale=10)


@given(rounds())
def test_fedprox_aggregates_as_flowers(rounds: list[list[Update]]) -> None:
    ours = make_strategy(AggregationTable.model_validate({"strategy": "fedprox"}))
    check(ours, flower.FedProx(proximal_mu=0.1), rounds, scale=10)


@given(rounds(max_rounds=6), st.sampled_from([1e-3, 0.1, 1.0]), st.floats(0, 0.99), st.floats(0, 0.999))
def test_fedadam_is_flowers_over_several_rounds(
    rounds: list[list[Update]], eta: float, beta_1: float, beta_2: float
) -> None:
    parameters: dict[str, Any] = {"eta": eta, "beta_1": beta_1, "beta_2": beta_2, "tau": 1e-2}
    check(FedAdam(**parameters), flower.FedAdam(**parameters), rounds, rtol=1e-3, scale=100)


@given(rounds())
def test_fedmedian_is_flowers(rounds: list[list[Update]]) -> None:
    check(FedMedian(), flower.FedMedian(), rounds)


@given(rounds(), st.floats(0, 0.49))
def test_trimmed_mean_is_flowers(rounds: list[list[Update]], trim_share: float) -> None:
    check(TrimmedMean(trim_share=trim_share), flower.FedTrimmedAvg(beta=trim_share), rounds, scale=10)


@given(rounds(min_updates=2), st.integers(0, 3), st.integers(1, 4))
def test_krum_is_flowers(rounds: list[list[Update]], malicious: int, selected: int) -> None:
    if not any(array.size for array in rounds[0][0].weights.values()):
        return
    check_krum(rounds, malicious, selected)


def check_krum(rounds: list[list[Update]], malicious: int, selected: int) -> None:
    """Compare where the scores differ by more than rounding, so that both must select the same updates."""
    ours = MultiKrum(malicious_clients=malicious, select_clients=selected)
    distances = squared_distances([update.weights for update in rounds[0]])
    np.fill_diagonal(distances, np.inf)
    neighbours = max(1, len(rounds[0]) - malicious - 2)
    scores = np.sort(np.sort(distances, axis=1)[:, :neighbours].sum(axis=1))
    if selected < len(scores) and not scores[selected] - scores[selected - 1] > 1e-3 * scores[selected]:
        return
    check(
        ours, flower.MultiKrum(num_malicious_nodes=malicious, num_nodes_to_select=selected), rounds, scale=10
    )


# --- laws --------------------------------------------------------------------------------------------


STRATEGIES: list[Callable[[], AggregationStrategy]] = [
    FedAvg,
    FedMedian,
    TrimmedMean,
    MultiKrum,
    lambda: MultiKrum(malicious_clients=1, select_clients=3),
]


def update(
    value: float, *, examples: int = 1, shape: tuple[int, ...] = (3,), dtype: Any = np.float32
) -> Update:
    return Update(f"c{value}", {"w": np.full(shape, value, dtype)}, examples, weight=float(examples))


@pytest.mark.parametrize("make", STRATEGIES)
def test_the_aggregate_of_equal_updates_is_the_update(make: Callable[[], AggregationStrategy]) -> None:
    same = [update(0.1) for _ in range(5)]
    assert np.array_equal(aggregate(make(), same[0].weights, [same])["w"], same[0].weights["w"])


@pytest.mark.parametrize("make", STRATEGIES)
def test_a_round_without_updates_has_no_result(make: Callable[[], AggregationStrategy]) -> None:
    strategy = make()
    strategy.begin_round({"w": np.ones(2)})
    assert strategy.end_round() is None


@pytest.mark.parametrize("make", [*STRATEGIES, FedAdam])
def test_updates_of_the_last_round_are_gone(make: Callable[[], AggregationStrategy]) -> None:
    strategy = make()
    aggregate(strategy, update(0.0).weights, [[update(1.0)]])
    strategy.begin_round({"w": np.ones(3)})
    assert strategy.end_round() is None


@pytest.mark.parametrize("make", [FedMedian, TrimmedMean, MultiKrum])
def test_robust_strategies_ignore_one_malicious_update(make: Callable[[], AggregationStrategy]) -> None:
    honest = [update(value) for value in (0.9, 1.0, 1.1, 1.2, 0.8)]
    result = aggregate(make(), update(0.0).weights, [[*honest, update(1e6, examples=10_000)]])
    assert 0.8 <= result["w"][0] <= 1.2


@pytest.mark.parametrize("make", [*STRATEGIES, FedAdam])
def test_without_global_weights_the_first_update_sets_the_names(
    make: Callable[[], AggregationStrategy],
) -> None:
    result = aggregate(make(), {}, [[update(1.0, dtype=np.float32), update(1.0), update(1.0)]])
    assert result["w"].tolist() == [1.0, 1.0, 1.0]
    assert result["w"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64", "bool", "float16", "complex64"])
@pytest.mark.parametrize("make", [FedAvg, FedMedian, TrimmedMean, MultiKrum])
def test_the_result_has_the_dtype_of_the_global_weights(
    make: Callable[[], AggregationStrategy], dtype: str
) -> None:
    ones = {"w": np.ones((2, 2), dtype)}
    updates = [Update(f"c{n}", ones, 10, weight=10.0) for n in range(3)]
    result = aggregate(make(), {"w": np.zeros((2, 2), dtype)}, [updates])
    assert result["w"].dtype == np.dtype(dtype)
    assert result["w"].tolist() == ones["w"].tolist()


def test_integers_are_rounded_and_stay_in_their_range() -> None:
    assert to_dtype(np.array([0.6, 300.0, -5.0]), np.dtype(np.uint8)).tolist() == [1, 255, 0]
    assert to_dtype(np.array([1e30]), np.dtype(np.int64))[0] > 2**62
    assert to_dtype(np.array([0.4, 0.5]), np.dtype(bool)).tolist() == [False, True]


def test_a_mean_is_correct_beyond_one_block() -> None:
    mean = RunningMean()
    array = np.arange(BLOCK_ELEMENTS * 2 + 3, dtype=np.float32).reshape(-1, 1).T
    mean.add({"w": array}, 1.0)
    mean.add({"w": array * 3}, 3.0)
    np.testing.assert_allclose(mean.mean()["w"], array * 2.5)


def test_distances_of_close_updates_survive_a_large_common_part() -> None:
    updates = [{"w": np.array([1e8, 0.0]) + offset} for offset in ([0, 0], [0, 3e-3], [0, 4e-3])]
    distances = squared_distances(updates)
    np.testing.assert_allclose(distances[0], [0.0, 9e-6, 16e-6], rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("fedavg", FedAvg),
        ("fedprox", FedAvg),
        ("fedadam", FedAdam),
        ("fedmedian", FedMedian),
        ("trimmed-mean", TrimmedMean),
        ("krum", MultiKrum),
    ],
)
def test_each_strategy_can_be_named(strategy: str, kind: type[AggregationStrategy]) -> None:
    assert type(make_strategy(AggregationTable.model_validate({"strategy": strategy}))) is kind


def test_the_mean_of_a_large_cohort_needs_memory_for_one_update() -> None:
    strategy = FedAvg()
    start = {"w": np.zeros(1_000_000, np.float32)}
    strategy.begin_round(start)
    tracemalloc.start()
    for number in range(20):
        strategy.add(Update(f"c{number}", {"w": np.full(1_000_000, number, np.float32)}, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = strategy.end_round()
    assert result is not None
    assert result["w"][0] == 9.5
    assert peak < 20e6  # one sum in float64, and one update
