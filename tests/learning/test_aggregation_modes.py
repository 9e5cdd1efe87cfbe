"""The aggregation modes of both libraries, compared with plain references for scripted arrivals."""

import gc
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.server import ServerAppComponents
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    Krum,
    MultiKrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import mode_references as reference
from learning.mode_runs import (
    START,
    Durations,
    ModeRun,
    examples_of,
    make_job,
    run_flower,
    run_functions,
    train,
)
from learning.scripted_messenger import ScriptedMessenger

from fedbus.contracts.run import RoundResult
from fedbus.learning.flower.array_records import to_record
from fedbus.learning.flower_superlink.library import SuperLinkLibrary
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import BadTask, ModeUnsupported
from fedbus.stores.tasks.task_directory import create_task, validate_task

Runner = Callable[..., ModeRun]
both_libraries = pytest.mark.parametrize("run", [run_flower, run_functions])

SLOW = {"c0": [1.0], "c1": [1.2], "c2": [5.0]}
"""Two fast clients, and one that needs four times as long."""
EXAMPLES = {client: examples_of(client) for client in SLOW}


def assert_equal(run: ModeRun, expected: reference.Aggregations) -> None:
    """Check the models, and the updates of each round. A client's last update in a round counts for its staleness."""
    assert run.updates == [dict(updates) for _, updates in expected]
    assert [result.updates for result in run.results] == [len(updates) for _, updates in expected]
    for model, (other, _) in zip(run.models, expected, strict=True):
        np.testing.assert_allclose(model, other, rtol=1e-12)


def schedules(clients: int = 3) -> st.SearchStrategy[dict[str, list[float]]]:
    """Return the durations of several trainings of each client. No two arrivals are at the same time."""
    times = st.lists(st.integers(1, 60), min_size=1, max_size=6)
    return st.tuples(*([times] * clients)).map(
        lambda lists: {
            f"c{index}": [one + 1e-3 * (index + 1) * np.sqrt(2 + index) for one in values]
            for index, values in enumerate(lists)
        }
    )


# --- the references -------------------------------------------------------------------------------


@both_libraries
@settings(max_examples=15)
@given(durations=schedules(), buffer_size=st.integers(1, 5))
def test_buffered_is_fedbuff(run: Runner, durations: dict[str, list[float]], buffer_size: int) -> None:
    result = run(durations, {"mode": "buffered", "buffer-size": buffer_size})
    assert_equal(result, reference.fedbuff(START, train, EXAMPLES, durations, buffer_size, 4))


@both_libraries
@settings(max_examples=15)
@given(durations=schedules(), alpha=st.floats(0.05, 1.0))
def test_async_is_fedasync(run: Runner, durations: dict[str, list[float]], alpha: float) -> None:
    result = run(durations, {"mode": "async", "alpha": alpha}, rounds=6)
    assert_equal(result, reference.fedasync(START, train, durations, alpha, 6))


@both_libraries
@settings(max_examples=15)
@given(
    durations=schedules(),
    deadline_s=st.integers(1, 80),
    min_updates=st.integers(1, 4),
    late=st.sampled_from(["merge", "drop"]),
)
def test_deadline_is_the_reference(
    run: Runner, durations: dict[str, list[float]], deadline_s: int, min_updates: int, late: str
) -> None:
    values = {"mode": "deadline", "deadline-s": deadline_s, "min-updates": min_updates, "late": late}
    result = run(durations, values)
    expected = reference.deadline(
        START, train, EXAMPLES, durations, deadline_s, min_updates, 4, drops=late == "drop"
    )
    assert_equal(result, expected)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda _: 1.0, {"staleness": "constant"}),
        (lambda s: (1 + s) ** -2.0, {"staleness": "polynomial", "staleness-a": 2.0}),
        (lambda s: 1.0 if s <= 1 else 1 / (10 * (s - 1) + 1), {"staleness": "hinge", "staleness-b": 1}),
        (lambda s: 1.0 if s <= 4 else 1 / (0.5 * (s - 4) + 1), {"staleness": "hinge", "staleness-a": 0.5}),
    ],
)
def test_the_staleness_functions_are_those_of_the_paper(
    function: Callable[[int], float], values: dict[str, Any]
) -> None:
    """Xie et al. 2019, section 5.2, with s = t - τ."""
    durations = {"c0": [1.0], "c1": [1.1], "c2": [9.3]}
    result = run_flower(durations, {"mode": "async", "alpha": 0.9, **values}, rounds=20)
    assert_equal(result, reference.fedasync(START, train, durations, 0.9, 20, weight=function))
    assert max(staleness["c2"] for staleness in result.updates if "c2" in staleness) > 5


# --- laws -----------------------------------------------------------------------------------------


@both_libraries
@settings(max_examples=8)
@given(durations=schedules())
def test_a_deadline_that_never_comes_is_sync(run: Runner, durations: dict[str, list[float]]) -> None:
    never = run(durations, {"mode": "deadline", "deadline-s": float("inf")})
    sync = run(durations, {"mode": "sync"})
    for one, other, plain in zip(
        never.models, sync.models, reference.fedavg(START, train, EXAMPLES, 4), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, plain, rtol=1e-12)
    assert [result.seconds for result in never.results] == [result.seconds for result in sync.results]
    assert {result.mode for result in sync.results} == {""}


@both_libraries
@given(durations=schedules())
@settings(max_examples=15)
def test_a_buffer_of_the_cohort_without_staleness_is_fedavg(
    run: Runner, durations: dict[str, list[float]]
) -> None:
    """In the first aggregation, all updates are of the same model, if no client is so fast that it answers twice."""
    first = {client: times[0] for client, times in durations.items()}
    slowest = max(first.values())
    once = {client: [time_s, slowest] for client, time_s in first.items()}
    result = run(once, {"mode": "buffered", "buffer-size": 3}, rounds=1)
    np.testing.assert_allclose(result.models[0], reference.fedavg(START, train, EXAMPLES, 1)[0], rtol=1e-12)
    assert result.results[0].staleness == {"c0": 0, "c1": 0, "c2": 0}


@both_libraries
def test_one_client_and_a_buffer_of_one_is_sync(run: Runner) -> None:
    extra = {} if run is run_functions else {"strategy": lambda: FedAvg(1.0, 0.0, 1, 0, 1)}
    buffered = run({"c0": [1.0]}, {"mode": "buffered", "buffer-size": 1}, **extra)
    for one, other in zip(buffered.models, reference.fedavg(START, train, {"c0": 10}, 4), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


# --- strategies -----------------------------------------------------------------------------------


def test_the_servers_optimizer_acts_on_the_buffer() -> None:
    """Momentum on the server: FedBuff with a server optimizer, as in section 3 of Nguyen et al."""
    velocity = np.zeros(3)

    def momentum(w: reference.Array, change: reference.Array) -> reference.Array:
        nonlocal velocity
        velocity = 0.9 * velocity + change
        return w + 0.5 * velocity

    result = run_flower(
        SLOW,
        {"mode": "buffered", "buffer-size": 2},
        strategy=lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9, fraction_evaluate=0.0),
        rounds=6,
    )
    expected = reference.fedbuff(START, train, EXAMPLES, SLOW, 2, 6, server=momentum)
    assert_equal(result, expected)


@pytest.mark.parametrize(
    "strategy", [lambda: FedAdam(eta=0.1), FedMedian, FedTrimmedAvg, lambda: FedAvg(fraction_train=0.5)]
)
@pytest.mark.parametrize("mode", ["deadline", "buffered", "async"])
def test_strategies_of_flower_run_unmodified(strategy: Any, mode: str) -> None:
    values: dict[str, Any] = {"mode": mode, "buffer-size": 3, "deadline-s": 2.0}
    result = run_flower(SLOW, values, strategy=strategy, rounds=8)
    assert len(result.models) == 8
    assert all(np.isfinite(model).all() for model in result.models)
    assert any(result.metrics.get("eval_loss") is not None for result in result.results)
    assert result.final is not None
    np.testing.assert_array_equal(result.final["w"], result.models[-1])


@pytest.mark.parametrize("mode", ["deadline", "buffered", "async"])
@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (Krum, "Krum: it compares the updates of a whole cohort"),
        (MultiKrum, "MultiKrum: it compares the updates"),
        (Bulyan, "Bulyan: it compares the updates"),
        (FedXgbBagging, "FedXgbBagging: its updates are trees"),
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 3),
            "DifferentialPrivacyServerSideFixedClipping: it does not derive from FedAvg",
        ),
    ],
)
def test_a_strategy_that_does_not_fit_the_mode_ends_the_run(strategy: Any, reason: str, mode: str) -> None:
    with pytest.raises(ModeUnsupported, match=f"the aggregation mode {mode} does not work with {reason}"):
        run_flower(SLOW, {"mode": mode}, strategy=strategy)


def test_krum_works_with_a_deadline_that_drops_late_updates() -> None:
    run = run_flower(SLOW, {"mode": "deadline", "deadline-s": 2.0, "late": "drop"}, strategy=Krum)
    assert [set(result.participants) for result in run.results] == [{"c0", "c1"}] * 4


def test_a_strategy_with_its_own_loop_ends_the_run() -> None:
    class OwnLoop(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    with pytest.raises(ModeUnsupported, match=r"OwnLoop: it has a loop of its own \(OwnLoop.start\)"):
        run_flower(SLOW, {"mode": "async"}, strategy=OwnLoop)


def test_an_app_that_sends_its_training_messages_itself_ends_the_run() -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        del context
        node = next(iter(grid.get_node_ids()))
        grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="train")])

    with pytest.raises(ModeUnsupported, match="this app sends its training messages itself"):
        run_flower(SLOW, {"mode": "buffered"}, app=app)


def test_a_legacy_app_ends_the_run() -> None:
    app = ServerApp(server_fn=lambda _: ServerAppComponents(strategy=LegacyFedAvg()))
    with pytest.raises(ModeUnsupported, match="the aggregation mode async needs a strategy"):
        run_flower(SLOW, {"mode": "async"}, app=app)


def test_flowers_superlink_refuses_the_mode_before_clients_join() -> None:
    run = ModeRun(ScriptedMessenger({}))
    with pytest.raises(ModeUnsupported, match="async does not work with the library flower-superlink"):
        SuperLinkLibrary().open_server(make_job(run, {"mode": "async"}, START))


def test_an_override_that_does_not_fit_the_task_is_a_bad_task() -> None:
    with pytest.raises(
        BadTask, match="the aggregation of the run does not fit the task: `eta` has no effect"
    ):
        run_flower(SLOW, {"eta": 0.5})


def test_a_flower_task_may_choose_a_mode(tmp_path: Path) -> None:
    create_task(tmp_path / "moons", "moons")
    pyproject = tmp_path / "moons" / "pyproject.toml"
    table = '\n[tool.fedbus.aggregation]\nmode = "deadline"\ndeadline-s = 30\nlate = "drop"\n'
    pyproject.write_text(pyproject.read_text() + table)
    assert validate_task(tmp_path / "moons", open_library) == []


def test_krum_of_functions_does_not_fit_the_mode() -> None:
    with pytest.raises(ModeUnsupported, match="mode buffered does not work with the strategy krum"):
        run_functions(SLOW, {"mode": "buffered", "strategy": "krum"})


def test_contributions_need_rounds() -> None:
    with pytest.raises(ModeUnsupported, match="contributions compare the updates of a round"):
        run_flower(SLOW, {"mode": "buffered"}, contribution={"every": 1})


# --- what clients get -----------------------------------------------------------------------------


@both_libraries
def test_a_client_that_trains_gets_no_second_message(run: Runner) -> None:
    result = run(SLOW, {"mode": "deadline", "deadline-s": 2.0}, rounds=8)
    times = [time_s for time_s, kind, _ in result.messenger.scripts["c2"].received if kind == "train"]
    assert all(later - earlier >= 5.0 for earlier, later in pairwise(times))
    assert len(times) >= 2


def test_clients_that_train_do_not_evaluate() -> None:
    """Their evaluation would wait behind the training, and the round for it."""
    strategy = lambda: FedAvg(fraction_evaluate=1.0)  # noqa: E731
    result = run_flower(SLOW, {"mode": "deadline", "deadline-s": 2.0}, strategy=strategy, evaluate_s=0.1)
    assert result.messenger.now() < 4 * (2.0 + 0.2)
    evaluations = [kind for _, kind, _ in result.messenger.scripts["c2"].received if kind == "evaluate"]
    assert len(evaluations) <= 1
    assert [result.metrics["eval_loss"] for result in result.results] == pytest.approx(
        [model.sum() for model in result.models]
    )


def test_an_evaluation_ends_at_the_deadline() -> None:
    strategy = lambda: FedAvg(fraction_evaluate=1.0)  # noqa: E731

    def slow_evaluation(messenger: Any) -> None:
        messenger.scripts["c1"].evaluate_s = 50.0

    result = run_flower(
        {"c0": [1.0], "c1": [1.2]},
        {"mode": "deadline", "deadline-s": 2.0},
        strategy=strategy,
        prepare=slow_evaluation,
        rounds=3,
    )
    assert result.messenger.now() < 20
    assert [set(result.participants) for result in result.results] == [{"c0", "c1"}, {"c0"}, {"c0"}]


@both_libraries
def test_as_many_clients_train_as_the_cohort_has(run: Runner) -> None:
    durations = {f"c{index}": [1.0 + index / 7] for index in range(6)}
    values: dict[str, Any] = {"mode": "buffered", "buffer-size": 2}
    if run is run_functions:
        result = run(durations, {**values, "fraction-train": 0.5}, rounds=12)
    else:
        half = lambda: FedAvg(fraction_train=0.5, fraction_evaluate=0.0)  # noqa: E731
        result = run(durations, values, strategy=half, rounds=12)
    assert result.messenger.max_open == 3
    trained = {client for client, script in result.messenger.scripts.items() if script.received}
    assert len(trained) > 3


@both_libraries
def test_a_client_that_joins_later_trains_at_once(run: Runner) -> None:
    def join_at_3(messenger: Any) -> None:
        messenger.present.remove("c2")
        messenger.at(3.05, lambda: messenger.join("c2"))

    if run is run_functions:
        result = run(
            {**SLOW, "c2": [0.4]}, {"mode": "buffered", "buffer-size": 3}, prepare=join_at_3, rounds=6
        )
    else:
        result = run(
            {**SLOW, "c2": [0.4]},
            {"mode": "buffered", "buffer-size": 3},
            strategy=lambda: FedAvg(fraction_evaluate=0.0, min_available_nodes=2),
            prepare=join_at_3,
            rounds=6,
        )
    assert "c2" in set().union(*(result.participants for result in result.results))


# --- hostile and unlucky clients ------------------------------------------------------------------

MODES = [
    {"mode": "sync"},
    {"mode": "deadline", "deadline-s": 3.0},
    {"mode": "buffered", "buffer-size": 2},
    {"mode": "async"},
]


@both_libraries
@pytest.mark.parametrize("values", MODES, ids=lambda values: values["mode"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"w": np.array([1.0, np.nan, 0.0])}, "NaN or infinity"),
        ({"w": np.array([np.inf, 0.0, 0.0])}, "NaN or infinity"),
        ({"w": np.zeros(4)}, r"'w' has .*shape \(4,\) instead of \(3,\)"),
    ],
    ids=["nan", "infinity", "shape"],
)
def test_an_invalid_update_is_the_failure_of_its_client(
    run: Runner, values: dict[str, Any], bad: dict[str, Any], reason: str
) -> None:
    def poison(client: str, _number: int, arrays: Any) -> Any:
        return bad if client == "c1" else arrays

    result = run(SLOW, values, change=poison, rounds=6)
    assert all(np.isfinite(model).all() and model.shape == (3,) for model in result.models)
    assert not any("c1" in result.participants for result in result.results)
    failures = [result.failures["c1"] for result in result.results if "c1" in result.failures]
    assert failures
    assert all(re.search(reason, one) for one in failures)


@both_libraries
@pytest.mark.parametrize("values", MODES[1:], ids=lambda values: values["mode"])
def test_a_missing_or_additional_array_is_the_failure_of_its_client(
    run: Runner, values: dict[str, Any]
) -> None:
    def rename(client: str, number: int, arrays: Any) -> Any:
        return {"v": arrays["w"]} if client == "c1" and number == 0 else arrays

    result = run(SLOW, values, change=rename, rounds=6)
    reason = next(result.failures["c1"] for result in result.results if "c1" in result.failures)
    assert "'v'" in reason or "lack 'w'" in reason
    assert any("c1" in result.participants for result in result.results)


@both_libraries
@pytest.mark.parametrize("values", MODES, ids=lambda values: values["mode"])
def test_a_client_that_raises_fails_alone(run: Runner, values: dict[str, Any]) -> None:
    def fail(client: str, _number: int, arrays: Any) -> Any:
        if client == "c0":
            raise RuntimeError("no data")
        return arrays

    result = run(SLOW, values, change=fail, rounds=6)
    assert not any("c0" in result.participants for result in result.results)
    assert any("no data" in result.failures.get("c0", "") for result in result.results)
    trainings = len(result.messenger.scripts["c0"].received)
    assert trainings <= 6, "a client that fails trains at most once for each model"


@both_libraries
@pytest.mark.parametrize("values", MODES[1:], ids=lambda values: values["mode"])
def test_a_client_that_leaves_in_mid_training_is_a_failure(run: Runner, values: dict[str, Any]) -> None:
    def leave(messenger: Any) -> None:
        messenger.at(0.5, lambda: messenger.leave("c1"))
        messenger.at(2.5, lambda: messenger.join("c1"))

    extra = (
        {}
        if run is run_functions
        else {"strategy": lambda: FedAvg(fraction_evaluate=0.0, min_available_nodes=2)}
    )
    result = run(SLOW, values, prepare=leave, rounds=8, **extra)
    assert "battery" in "".join(result.failures.get("c1", "") for result in result.results)
    assert any("c1" in result.participants for result in result.results), "it takes part again"


@pytest.mark.parametrize("values", MODES[1:], ids=lambda values: values["mode"])
def test_a_client_that_never_answers_fails_after_its_time(values: dict[str, Any]) -> None:
    durations: Durations = {"c0": [1.0], "c1": [1.2], "c2": [None, 0.5]}
    result = run_flower(durations, values, rounds=15, plan={"round_s": 4.0})
    failed = [one.round for one in result.results if "no reply" in one.failures.get("c2", "")]
    assert len(failed) == 1
    assert any("c2" in one.participants for one in result.results if one.round > failed[0])


def test_a_round_whose_clients_all_fail_keeps_the_model() -> None:
    def fail(_client: str, number: int, arrays: Any) -> Any:
        if number == 0:
            raise RuntimeError("not yet")
        return arrays

    result = run_flower(SLOW, {"mode": "buffered", "buffer-size": 2}, change=fail, rounds=3)
    np.testing.assert_array_equal(result.models[0], START)
    assert not np.array_equal(result.models[1], START)


# --- late updates ---------------------------------------------------------------------------------


def totals(results: list[RoundResult]) -> tuple[int, int]:
    return sum(one.late_merged for one in results), sum(one.late_dropped for one in results)


@both_libraries
def test_late_updates_are_counted(run: Runner) -> None:
    values = {"mode": "deadline", "deadline-s": 2.0}
    merged = run(SLOW, values, rounds=8)
    dropped = run(SLOW, {**values, "late": "drop"}, rounds=8)
    assert totals(merged.results)[0] >= 1
    assert totals(merged.results)[1] == 0
    assert totals(dropped.results)[0] == 0
    assert totals(dropped.results)[1] >= 1
    assert not any("c2" in result.participants for result in dropped.results)
    assert {result.mode for result in merged.results} == {"deadline"}


@both_libraries
def test_an_update_beyond_the_maximum_staleness_is_dropped(run: Runner) -> None:
    result = run(SLOW, {"mode": "async", "max-staleness": 2}, rounds=12)
    assert totals(result.results)[1] >= 1
    assert all(staleness <= 2 for one in result.updates for staleness in one.values())


def test_an_update_of_an_earlier_training_of_the_app_is_dropped() -> None:
    """Its model is that of another strategy."""
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        del context
        for _ in range(2):
            strategy = FedAvg(fraction_evaluate=0.0)
            strategy.start(grid=grid, initial_arrays=to_record({"w": START}), num_rounds=2)

    run = run_flower(
        SLOW, {"mode": "deadline", "deadline-s": 2.0, "min-updates": 3}, app=app, plan={"rounds": 0}
    )
    assert [result.round for result in run.results] == [1, 2, 3, 4]
    fast = run_flower(SLOW, {"mode": "deadline", "deadline-s": 2.0}, app=app, plan={"rounds": 0})
    assert [result.late_dropped for result in fast.results] == [0, 0, 0, 1]


@both_libraries
def test_a_resumed_run_continues_with_its_round(run: Runner) -> None:
    result = run(SLOW, {"mode": "buffered", "buffer-size": 2}, first_round=3, rounds=4)
    assert [result.round for result in result.results] == [3, 4]
    assert {staleness for one in result.updates for staleness in one.values()} <= {0, 1}


def test_the_memory_for_old_models_is_bounded_by_the_clients_that_train() -> None:
    """Each open message keeps its own model; nothing else does."""
    big = np.zeros(1000)
    kept: list[int] = []
    seen: list[Any] = []

    def note(client: str, _number: int, arrays: Any) -> Any:
        del client
        return arrays

    class Watch(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, *args: Any) -> Any:
            seen.append(weakref.ref(arrays))
            gc.collect()
            kept.append(sum(one() is not None for one in seen))
            return super().configure_train(server_round, arrays, *args)

    run_flower(
        SLOW,
        {"mode": "async"},
        strategy=lambda: Watch(fraction_evaluate=0.0),
        change=note,
        start=big,
        rounds=30,
    )
    assert max(kept) <= len(SLOW) + 2
