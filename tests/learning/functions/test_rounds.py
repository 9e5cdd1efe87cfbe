"""The rounds of a run: training, aggregation, evaluation, failures, and resumption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.contracts.run import Scalar
from fedbus.contracts.task.task import Task
from fedbus.learning.functions.message_codec import Content, encode
from fedbus.learning.library import (
    BadTask,
    ClientJob,
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    NoUpdates,
    OutgoingMessage,
    ReplyError,
    TrainingFailed,
)
from fedbus.learning.payload import Payload
from fedbus.learning.task_code import load
from fedbus.learning.weights import ArchitectureMismatch

from .local_run import FUNCTIONS, LIBRARY, LocalRun, lose, make_task

TRAIN = 'return weights, {"train_loss": 1 / config["server-round"]}, 10 * (int(data) + 1)'


# --- a run ------------------------------------------------------------------------------------------


def test_each_round_trains_aggregates_and_evaluates(tmp_path: Path) -> None:
    """Clients add 1 and 2, with 10 and 20 examples: each round adds 5/3."""
    run = LocalRun(make_task(tmp_path))
    assert run.final is not None
    np.testing.assert_allclose(run.final["w"], [5, 5], rtol=1e-6)
    assert run.final["w"].dtype == np.float32
    assert [result.round for result in run.results] == [1, 2, 3]
    assert run.results[0].participants == {"c0": 10, "c1": 20}
    assert run.metric("train_loss") == pytest.approx([1, 1 / 2, 1 / 3])
    assert run.metric("eval_loss") == pytest.approx([5 / 3, 10 / 3, 5])


def test_metrics_are_weighted_by_examples(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path, FUNCTIONS.replace('1 / config["server-round"]', "data")), rounds=1)
    assert run.metric("train_loss") == pytest.approx([2 / 3])


def test_three_rounds_are_the_default(tmp_path: Path) -> None:
    declaration = LIBRARY.read_app(
        {"tool": {"fedbus": {"functions": "tiny_app.functions"}}}, _write(tmp_path)
    )
    assert (declaration.rounds, declaration.problems) == (3, ())


def _write(directory: Path) -> Path:
    make_task(directory)
    return directory


def test_a_resumed_run_continues_with_the_checkpoint(tmp_path: Path) -> None:
    whole = LocalRun(make_task(tmp_path), rounds=4)
    resumed = LocalRun(make_task(tmp_path), rounds=4, first_round=3, model=whole.models[1])
    assert [result.round for result in resumed.results] == [3, 4]
    assert resumed.final is not None
    assert whole.final is not None
    np.testing.assert_allclose(resumed.final["w"], whole.final["w"], rtol=1e-6)


def test_without_initial_the_first_updates_make_the_model(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("def initial", "def unused").replace(
        'weights["w"] +=', 'weights = weights or {"w": np.zeros(2, np.float32)}; weights["w"] +='
    )
    task = make_task(tmp_path, functions)
    assert LIBRARY.initial_model(task) is None
    run = LocalRun(task)
    assert run.final is not None
    np.testing.assert_allclose(run.final["w"], [5, 5], rtol=1e-6)


def test_without_initial_updates_must_agree_with_the_first(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("def initial", "def unused").replace(
        'weights["w"] += 1 + data', 'weights = {"w": np.ones(int(data) + 1)}'
    )
    run = LocalRun(make_task(tmp_path, functions), rounds=1)
    assert run.results[0].failures == {"c1": "'w' has shape (2,) instead of (1,)"}


def test_state_is_kept_between_the_rounds_of_a_run(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("def train(weights, data, config):", STATE_TRAIN)
    run = LocalRun(make_task(tmp_path, functions.replace('1 / config["server-round"]', 'state["calls"]')))
    assert run.metric("train_loss") == [1, 2, 3]


STATE_TRAIN = """def train(weights, data, config, state):
    state["calls"] = state.get("calls", 0) + 1"""


def test_a_message_that_fails_leaves_no_entry_in_the_state(tmp_path: Path) -> None:
    fails_once = (
        STATE_TRAIN
        + """
    state["half"] = data
    if config["server-round"] == 1 and data == 0:
        raise ValueError("no data")
    del state["half"]"""
    )
    functions = FUNCTIONS.replace("def train(weights, data, config):", fails_once)
    functions = functions.replace('1 / config["server-round"]', 'state["calls"] + 100 * len(state)')
    run = LocalRun(make_task(tmp_path, functions))
    assert list(run.results[0].failures) == ["c0"]
    calls = [round((10 * 1 + 20 * 2) / 30, 6), round((10 * 2 + 20 * 3) / 30, 6)]
    assert run.metric("train_loss")[1:] == pytest.approx([100 + value for value in calls])


def test_only_a_share_of_the_clients_trains(tmp_path: Path) -> None:
    extra = "[tool.fedbus.aggregation]\nfraction-train = 0.5\nfraction-evaluate = 0.25\nmin-clients = 2\n"
    run = LocalRun(make_task(tmp_path, extra=extra), clients=8)
    trained = [sorted(result.participants) for result in run.results]
    assert [len(clients) for clients in trained] == [4, 4, 4]
    assert len({tuple(clients) for clients in trained}) > 1
    evaluated = [message for message in run.messenger.sent if message.kind == "evaluate"]
    assert len(evaluated) == 6


def test_evaluation_can_be_switched_off(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path, extra="[tool.fedbus.aggregation]\nfraction-evaluate = 0.0\n"))
    assert run.metric("eval_loss") == []


def test_the_server_evaluates_the_first_and_each_new_model(tmp_path: Path) -> None:
    functions = FUNCTIONS + "\ndef evaluate_global(weights, config):\n    return {'loss': weights['w'][0]}\n"
    run = LocalRun(make_task(tmp_path, functions))
    assert run.metric("loss") == pytest.approx([0, 5 / 3, 10 / 3, 5])
    assert [result.round for result in run.results] == [0, 1, 2, 3]


def test_a_run_config_reaches_the_functions(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace('1 / config["server-round"]', 'config["optimizer.lr"]')
    task = make_task(tmp_path, functions, extra="[tool.fedbus.config]\noptimizer.lr = 0.5\n")
    assert LocalRun(task, rounds=1).metric("train_loss") == [0.5]
    assert LocalRun(task, rounds=1, config={"optimizer.lr": 0.25}).metric("train_loss") == [0.25]


def test_fedprox_gives_the_clients_mu_and_the_global_weights(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("import numpy as np", "import numpy as np\n" + PROXIMAL_IMPORT).replace(
        '1 / config["server-round"]',
        'proximal_term(weights, config["global-weights"], config["proximal-mu"])',
    )
    extra = '[tool.fedbus.aggregation]\nstrategy = "fedprox"\nproximal-mu = 0.5\n'
    run = LocalRun(make_task(tmp_path, functions, extra), clients=1, rounds=1)
    assert run.metric("train_loss") == pytest.approx([0.5 / 2 * 2])


PROXIMAL_IMPORT = "from fedbus.learning.functions import proximal_term"


# --- the task's own aggregation ---------------------------------------------------------------------

AGGREGATE = """
def aggregate(weights, updates, config, state):
    state["rounds"] = state.get("rounds", 0) + 1
    assert state["rounds"] == config["server-round"]
    best = max(updates, key=lambda update: update.num_examples)
    return {"w": np.append(weights["w"], best.weights["w"][-1])}
"""


def test_a_task_can_aggregate_itself_and_change_shapes(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path, FUNCTIONS + AGGREGATE))
    assert run.final is not None
    assert run.final["w"].tolist() == [0, 0, 2, 4, 6]


def test_a_fixed_architecture_refuses_other_shapes(tmp_path: Path) -> None:
    functions = FUNCTIONS + (
        "\ndef aggregate(weights, updates, config):\n"
        "    return {name: np.tile(array, 2) for name, array in updates[0].weights.items()}\n"
    )
    reason = (
        r"aggregate at tiny_app/functions.py:17: 'w' has shape \(4,\) instead of \(2,\)\. "
        'The task declares architecture = "fixed"'
    )
    with pytest.raises(TrainingFailed, match=reason):
        LocalRun(make_task(tmp_path, functions, 'architecture = "fixed"'))


def test_global_weights_cannot_be_changed_in_place(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS + "\ndef aggregate(weights, updates, config):\n    weights['w'] += 1\n    return weights\n"
    )
    with pytest.raises(TrainingFailed, match=r"aggregate raised ValueError: .*read-only.*functions\.py:18"):
        LocalRun(make_task(tmp_path, functions))


def test_a_bad_result_of_aggregate_ends_the_run(tmp_path: Path) -> None:
    functions = FUNCTIONS + "\ndef aggregate(weights, updates, config):\n    return [1.0]\n"
    with pytest.raises(
        TrainingFailed, match=r"aggregate at tiny_app/functions.py:17: the weights are a list"
    ):
        LocalRun(make_task(tmp_path, functions))


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("1 / 0", "train raised ZeroDivisionError: division by zero"),
        ("exit(3)", "train raised SystemExit: 3"),
        ("weights", "it returned a dict instead of (weights, metrics, num_examples)"),
        ("(weights, 3)[:]", "it returned 2 values instead of (weights, metrics, num_examples)"),
        ("[1.0], {}, 1", "the weights are a list. Return a dict of NumPy arrays"),
        ('{"w": [1.0, 2.0]}, {}, 1', "'w' is a list instead of a NumPy array"),
        ('{"w": np.array(["a", "b"])}, {}, 1', "'w' has dtype <U1. Use one of float64"),
        ('{"w": np.array([1.0, np.nan])}, {}, 1', "'w' contains NaN or infinity"),
        ('{"v": np.zeros(2)}, {}, 1', "the weights lack 'w', which the global weights have"),
        ('{"w": np.zeros(3)}, {}, 1', "'w' has shape (3,) instead of (2,)"),
        (
            '{**weights, "v": np.zeros(3)}, {}, 1',
            "the weights have 'v', which the global weights do not have",
        ),
        ("{1: np.zeros(3)}, {}, 1", "1 is not a name of an array"),
        ("weights, [1], 1", "the metrics are a list. Return a dict of numbers"),
        ('weights, {"loss": "low"}, 1', "metric 'loss' is a str. Return a number"),
        ("weights, {}, 1.5", "num_examples is 1.5, which is not an integer"),
        ("weights, {}, -1", "num_examples is -1. Return the number of examples"),
    ],
)
def test_a_failed_client_is_named_and_the_others_train(tmp_path: Path, result: str, reason: str) -> None:
    functions = FUNCTIONS.replace(
        TRAIN, f"if data == 1:\n        result = {result}\n        return result\n    {TRAIN}"
    )
    run = LocalRun(make_task(tmp_path, functions), rounds=1)
    assert list(run.results[0].failures) == ["c1"]
    assert reason in run.results[0].failures["c1"]
    assert "tiny_app/functions.py:1" in run.results[0].failures["c1"]
    assert run.results[0].participants == {"c0": 10}
    assert run.models[0]["w"].tolist() == [1, 1]


def test_a_run_ends_at_once_if_every_client_fails(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace(TRAIN, "raise KeyError('coef')")
    with pytest.raises(TrainingFailed) as error:
        LocalRun(make_task(tmp_path, functions))
    assert str(error.value) == (
        "no client could train in round 1: c0: train raised KeyError: 'coef' (tiny_app/functions.py:12) "
        "(failed too: c1)"
    )


def test_a_failing_share_of_the_clients_does_not_end_the_run(tmp_path: Path) -> None:
    """In each round one of eight clients is chosen, and only client 5 can train."""
    functions = FUNCTIONS.replace(TRAIN, f"1 / (data == 5)\n    {TRAIN}")
    extra = "[tool.fedbus.aggregation]\nfraction-train = 0.1\n"
    run = LocalRun(make_task(tmp_path, functions, extra), clients=8, rounds=4)
    assert [len(result.participants | result.failures) for result in run.results] == [1, 1, 1, 1]
    assert sum(len(result.failures) for result in run.results) > 0


def test_a_round_of_lost_clients_keeps_the_model(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path), clients=1, rounds=2, intercept=lose("c0", rounds=[1]))
    assert [model["w"].tolist() for model in run.models] == [[0, 0], [1, 1]]
    assert run.results[0].failures == {"c0": "no heartbeat for 10 s"}


def test_a_run_of_lost_clients_fails_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(NoUpdates, match=r"in any round: c0: no heartbeat for 10 s$"):
        LocalRun(make_task(tmp_path), clients=1, rounds=2, intercept=lose("c0"))


def test_a_run_of_cohorts_ends_when_every_client_has_failed(tmp_path: Path) -> None:
    """In each round one of eight clients is chosen, and no client can train."""
    functions = FUNCTIONS.replace(TRAIN, "raise KeyError('coef')")
    extra = "[tool.fedbus.aggregation]\nfraction-train = 0.1\n"
    with pytest.raises(
        NoUpdates, match=r"in any round: c\d: train raised KeyError: 'coef' .*failed too: c\d"
    ):
        LocalRun(make_task(tmp_path, functions, extra), clients=8, rounds=4)
    with pytest.raises(NoUpdates, match=r"in round \d+: .*failed too: (c\d, ){4}c\d and 2 more"):
        LocalRun(make_task(tmp_path, functions, extra), clients=8, rounds=90)


def test_a_resumed_run_may_end_without_an_update(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path), clients=1, rounds=2, first_round=2, intercept=lose("c0"))
    assert [result.round for result in run.results] == [2]


def test_a_client_without_examples_does_not_count(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("10 * (int(data) + 1)", "10 * int(data)")
    run = LocalRun(make_task(tmp_path, functions), rounds=1)
    assert run.models[0]["w"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"garbage", "the message is truncated"),
        (
            Content({"metrics": {}, "num-examples": 10}, {"w": np.full(2, np.inf)}),
            "'w' contains NaN or infinity",
        ),
        (
            Content({"metrics": {}, "num-examples": 10}, {"w": np.ones(3)}),
            "'w' has shape (3,) instead of (2,)",
        ),
        (
            Content({"metrics": {}, "num-examples": "10"}, {"w": np.ones(2)}),
            "num_examples of the reply is '10'",
        ),
        (
            Content({"metrics": {}, "num-examples": 10**400}, {"w": np.ones(2)}),
            "num_examples of the reply is 10000",
        ),
        (
            Content({"metrics": 1, "num-examples": 1}, {"w": np.ones(2)}),
            "the metrics of the reply are not an object",
        ),
    ],
)
def test_the_server_does_not_trust_a_reply(tmp_path: Path, content: bytes | Content, reason: str) -> None:
    buffers = [content] if isinstance(content, bytes) else encode(content)

    def intercept(message: OutgoingMessage, response: ClientResponse) -> ClientResponse:
        if message.client == "c1" and message.kind == "train":
            return ClientResponse(payload=Payload.pack(buffers))
        return response

    run = LocalRun(make_task(tmp_path), rounds=1, intercept=intercept)
    assert reason in run.results[0].failures["c1"]
    assert run.models[0]["w"].tolist() == [1, 1]


def test_a_metric_that_is_not_finite_is_left_out_of_the_mean(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace('1 / config["server-round"]', "np.nan if data else 1.0")
    run = LocalRun(make_task(tmp_path, functions), rounds=1)
    assert run.metric("train_loss") == [1.0]


def test_a_failing_evaluation_does_not_end_the_run(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace('return {"eval_loss"', '1 / data\n    return {"eval_loss"')
    run = LocalRun(make_task(tmp_path, functions))
    assert "evaluate raised ZeroDivisionError" in run.results[0].failures["c0"]
    assert run.metric("eval_loss") == pytest.approx([5 / 3, 10 / 3, 5])


def test_data_that_cannot_be_loaded_name_the_client(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("return float(partition_id)", "return [7.0][partition_id]")
    run = LocalRun(make_task(tmp_path, functions), rounds=1)
    assert run.results[0].failures == {
        "c1": "load raised IndexError: list index out of range (tiny_app/functions.py:5)"
    }


def test_a_failing_global_evaluation_ends_the_run(tmp_path: Path) -> None:
    functions = FUNCTIONS + "\ndef evaluate_global(weights, config):\n    return weights['x']\n"
    with pytest.raises(
        TrainingFailed, match=r"evaluate_global raised KeyError: 'x' \(tiny_app/functions.py:18\)"
    ):
        LocalRun(make_task(tmp_path, functions))


def test_stored_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureMismatch, match=r"'w' is float32\[3\] instead of float32\[2\]"):
        LocalRun(make_task(tmp_path), model={"w": np.zeros(3, np.float32)})


def test_an_unknown_kind_of_message_is_an_error_reply(tmp_path: Path) -> None:
    run = LocalRun(make_task(tmp_path), rounds=1)
    query = OutgoingMessage(client="c0", kind="query", payload=run.messenger.sent[0].payload, round=1)
    error = next(iter(run.messenger.send([query]))).error
    assert error == ReplyError(
        ErrorCode.UNKNOWN, "there is no function for messages of kind 'query'", "UnknownKind"
    )


# --- check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "import numpy as np",
            "import numpy as np\nimport no_such_library",
            "imports 'no_such_library', which is not",
        ),
        ("import numpy as np", "import numpy as np\n1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def load", "load = 3\ndef unload", "load of .* is a int"),
        (
            "def train",
            "import functools\ndef swap(f): return lambda data: 1\n@swap\ndef train",
            r"train at tiny_app/functions.py:11 cannot be called as fedbus calls it \(too many positional arguments\)",
        ),
        (
            'return {"w": np.zeros(2, np.float32)}',
            "return None",
            "initial at tiny_app/functions.py:7: the weights are a NoneType",
        ),
    ],
)
def test_the_check_imports_and_names_the_fault(tmp_path: Path, old: str, new: str, reason: str) -> None:
    task = make_task(tmp_path, FUNCTIONS.replace(old, new, 1))
    with pytest.raises(BadTask, match=reason):
        check(task)


def check(task: Task) -> None:
    LIBRARY.check(task, server_side=True)
    LIBRARY.initial_model(task)


# --- captured data ----------------------------------------------------------------------------------


class CapturedRun:
    """One client, which counts the calls of `load`."""

    def __init__(self, directory: Path) -> None:
        functions = FUNCTIONS.replace(
            "def load(partition_id):\n    return float(partition_id)",
            "calls = []\ndef load(captured):\n    calls.append(captured)\n    return float(len(calls))",
        )
        self._task = make_task(directory, functions.replace("10 * (int(data) + 1)", "int(data)"))
        self._session = LIBRARY.open_client(ClientJob(task=self._task, client="c0", run="run-1"))
        self._file = directory / "captured.npz"

    def capture(self, rows: int) -> None:
        np.savez(self._file, inputs=np.ones((rows, 2)), labels=np.zeros(rows))

    def loads_after(self, kind: str) -> int:
        """The number of calls of `load` after a message of this *kind*."""
        node_config: dict[str, Scalar] = (
            {"captured-data": str(self._file)} if self._file.exists() and kind == "train" else {}
        )
        request = Content({"config": {"server-round": 1}}, {"w": np.zeros(2, np.float32)})
        message = IncomingMessage(
            message_id="m", kind=kind, data=b"".join(encode(request)), node_config=node_config
        )
        assert self._session.handle(message).error is None
        return len(self.captured())

    def captured(self) -> list[Any]:
        """The argument of each call of `load`."""
        calls: list[Any] = load(Path(self._task.path), "tiny_app.functions:calls")
        return calls


def test_data_are_loaded_once_and_again_with_new_captured_data(tmp_path: Path) -> None:
    run = CapturedRun(tmp_path)
    assert [run.loads_after("train"), run.loads_after("evaluate"), run.loads_after("train")] == [1, 1, 1]
    assert run.captured() == [None]
    run.capture(3)
    assert [run.loads_after("train"), run.loads_after("evaluate"), run.loads_after("train")] == [2, 2, 2]
    inputs, labels = run.captured()[-1]
    assert (inputs.shape, labels.shape) == ((3, 2), (3,))
    run.capture(4)
    assert run.loads_after("train") == 3
