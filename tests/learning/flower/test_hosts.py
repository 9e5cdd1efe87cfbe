"""The hosts of ServerApps and ClientApps: input, output and errors."""

from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from learning.flower.memory_bus import (
    QUERY_APP,
    RUN,
    TASK,
    initial_model,
    open_memory_federation,
    render_server_app,
)

from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import Scalar
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.client_app_host import ClientAppHost, client_metrics
from fedbus.learning.flower.private_api import CLIENT_APP_RAISED
from fedbus.learning.flower.server_app_host import ServerAppFailed
from fedbus.learning.flower.strategy_hook import loaded_subclasses
from fedbus.learning.library import BadTask, ClientJob, ClientResponse, ErrorCode, IncomingMessage
from fedbus.learning.weights import ArchitectureMismatch, first_difference

# --- ServerApps ---------------------------------------------------------------------------


async def test_the_stored_model_trains_for_the_planned_rounds(tmp_path: Path) -> None:
    stored = {name: array + 50 for name, array in initial_model().items()}
    async with open_memory_federation(tmp_path, rounds=3) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        final = await fed.run(stored, run_config={"num-server-rounds": 99})

    np.testing.assert_allclose(final["w"], 53.0)
    assert [result.round for result in fed.results] == [0, 1, 2, 3]
    assert fed.results[0].metrics == {}
    assert fed.results[0].participants == {}
    for (result, arrays), expected in zip(fed.rounds, (50, 51, 52, 53), strict=True):
        assert first_difference(initial_model(), arrays) is None
        np.testing.assert_allclose(arrays["w"], expected, err_msg=str(result.round))


async def test_a_lost_run_resumes_at_its_first_round(tmp_path: Path) -> None:
    async with open_memory_federation(
        tmp_path, rounds=5, server=render_server_app(evaluate_fn="centralized")
    ) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        await fed.run(initial_model(), first_round=4)

    assert [result.round for result in fed.results] == [4, 5]
    assert [result.loss for result in fed.results] == [96.0, 95.0]
    assert fed.results[0].participants == {"c1": 1, "c2": 1}
    assert {message.round for message in fed.bus.published if isinstance(message, RoundMessage)} == {4, 5}


async def test_another_architecture_is_rejected_with_the_difference(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path) as fed:
        with pytest.raises(ArchitectureMismatch, match=r"'w' is float32\[5, 3\] instead of float32\[4, 3\]"):
            await fed.run(initial_model() | {"w": np.zeros((5, 3), np.float32)})


async def test_an_app_with_numbered_arrays_gets_numbered_arrays(tmp_path: Path) -> None:
    server = render_server_app().replace('{"w": ', '{"0": ').replace('"b": ', '"1": ')
    client = """
        from flwr.app import Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        app = ClientApp()
        @app.train()
        def train(message, context):
            metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
            assert list(message.content["arrays"]) == ["0", "1"]
            return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
        @app.evaluate()
        def evaluate(message, context):
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
    """
    async with open_memory_federation(tmp_path, server=server, client=client) as fed:
        fed.add("c1")
        fed.add("c2")
        final = await fed.run({name: array + 3 for name, array in initial_model().items()})

    assert not fed.results[1].failures
    assert list(final) == ["w", "b"]
    np.testing.assert_allclose(final["w"], 3.0)


async def test_integer_tensors_keep_their_dtype(tmp_path: Path) -> None:
    server = render_server_app().replace("np.zeros(2, np.float64)", "np.zeros((), np.int64)")
    async with open_memory_federation(tmp_path, server=server) as fed:
        fed.add("c1", step=1, samples=10)
        fed.add("c2", step=1, samples=39)  # 49 * (1 / 49) is 0.9999999999999999
        final = await fed.run(initial_model() | {"b": np.zeros((), np.int64)})

    assert final["b"].dtype == np.int64
    assert int(final["b"]) == 2


async def test_stock_aggregation_gives_the_same_result(tmp_path: Path) -> None:
    finals = []
    for streaming in (True, False):
        home = tmp_path / str(streaming)
        home.mkdir()
        async with open_memory_federation(home) as fed:
            fed.add("c1", step=1, samples=30)
            fed.add("c2", step=2, samples=10)
            finals.append(await fed.run(initial_model(), aggregation="streaming" if streaming else "stock"))
    np.testing.assert_allclose(finals[0]["w"], finals[1]["w"], rtol=1e-6)


async def test_a_strategy_that_overrides_start_is_hooked(tmp_path: Path) -> None:
    server = render_server_app("Own()").replace(
        "rounds_seen = []",
        dedent("""
        class Own(FedAvg):
            def start(self, grid, initial_arrays, num_rounds=3, **options):
                return super().start(grid, initial_arrays, num_rounds, **options)

        rounds_seen = []
        """),
    )
    starts = {cls: vars(cls)["start"] for cls in loaded_subclasses(Strategy) if "start" in vars(cls)}
    async with open_memory_federation(tmp_path, server=server) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        await fed.run(initial_model())

    assert [result.round for result in fed.results] == [0, 1, 2]
    assert all(vars(cls)["start"] is start for cls, start in starts.items())


@pytest.mark.parametrize(
    ("strategy", "error", "reason"),
    [
        ("1 / 0", ServerAppFailed, "the ServerApp raised ZeroDivisionError: division by zero"),
        ("exit(3)", ServerAppFailed, "the ServerApp raised SystemExit: 3"),
        ("FedAvg(weighted_by_key='age')", ServerAppFailed, "Missing required key `age`"),
    ],
)
async def test_a_server_app_that_raises_gives_the_reason(
    tmp_path: Path, strategy: str, error: type[Exception], reason: str
) -> None:
    async with open_memory_federation(tmp_path, server=render_server_app(strategy)) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        with pytest.raises(error, match=reason):
            await fed.run(initial_model())


async def test_a_task_without_its_app_is_rejected(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, server="apq = 5\n") as fed:
        with pytest.raises(BadTask, match="has no 'app'"):
            await fed.run(initial_model())


# --- ClientApps ---------------------------------------------------------------------------------


def make_host(tmp_path: Path, text: str) -> ClientAppHost:
    name = f"client_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(dedent(text))
    task = Task(
        table=TaskTable.model_validate({"task": TASK, "model": "models:build"}),
        app={"serverapp": f"{name}:app", "clientapp": f"{name}:app"},
        run_config={"lr": 0.5},
        code_version="v1",
        path=str(tmp_path),
    )
    return ClientAppHost(ClientJob(task=task, client="c1", run=RUN))


def make_message(content: RecordDict, **node_config: Scalar) -> IncomingMessage:
    data = record_codec.encode(content).to_bytes()
    return IncomingMessage(
        message_id="m1", kind="query", data=data, round=3, group_id="3", node_config=node_config
    )


def content() -> RecordDict:
    return RecordDict({"config": ConfigRecord({"ask": "me"})})


def decode(response: ClientResponse) -> RecordDict:
    assert response.payload is not None
    return record_codec.decode(response.payload.to_bytes())


def test_a_message_gets_a_reply(tmp_path: Path) -> None:
    response = make_host(tmp_path, QUERY_APP).handle(make_message(content()))
    assert decode(response) == content()
    assert response.error is None
    assert response.ttl_s is not None
    assert response.ttl_s > 0


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        (
            QUERY_APP.replace("return ", "1 / 0 #"),
            CLIENT_APP_RAISED,
            "raised ZeroDivisionError: division by zero",
        ),
        (
            QUERY_APP.replace("return ", "exit('bye') #"),
            CLIENT_APP_RAISED,
            "the ClientApp raised SystemExit: bye",
        ),
        (
            QUERY_APP.replace("return ", "return 5 #"),
            CLIENT_APP_RAISED,
            "it returned int instead of a flwr.app.Message",
        ),
        (QUERY_APP.replace("@app.query()", ""), CLIENT_APP_RAISED, "No query function registered"),
    ],
)
def test_a_failure_is_an_error_reply_of_one_line(tmp_path: Path, text: str, code: int, reason: str) -> None:
    response = make_host(tmp_path, text).handle(make_message(content()))
    assert response.payload is None
    assert response.error is not None
    assert response.error.code == code
    assert reason in response.error.reason
    assert "\n" not in response.error.reason


def test_an_error_of_the_app_keeps_its_code_and_text(tmp_path: Path) -> None:
    text = QUERY_APP.replace(
        "return Message(message.content", "from flwr.app import Error; return Message(Error(66, 'a\\n b')"
    )
    response = make_host(tmp_path, text).handle(make_message(content()))
    assert response.error is not None
    assert (response.error.code, response.error.reason) == (66, "a\n b")


def test_a_message_that_fails_leaves_no_trace_in_the_state(tmp_path: Path) -> None:
    text = QUERY_APP.replace(
        "return ",
        "context.state['config'] = message.content['config']; "
        "context.state['config']['n'] = len(context.state); 1 / context.node_config['n']; return ",
    )
    host = make_host(tmp_path, text)
    for n in (1, 0):
        host.handle(make_message(content(), n=n))
        assert host._context.state["config"] == ConfigRecord({"ask": "me", "n": 1})


def test_metrics_of_two_records_keep_both_values() -> None:
    records = RecordDict({"a": MetricRecord({"loss": 1.0}), "b": MetricRecord({"loss": 2.0, "acc": 0.5})})
    assert client_metrics("train", records) == {"train_loss": 1.0, "train_b.loss": 2.0, "train_accuracy": 0.5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            QUERY_APP.replace("import ClientApp", "import NoApp"),
            r"cannot import name 'NoApp' from .* \(client_of_\w+\.py:3\)$",
        ),
        (
            "import no_such_library\n",
            r"imports 'no_such_library', which is not installed \(client_of_\w+\.py:1\)$",
        ),
        ("x =\n", r"cannot be imported: SyntaxError: .*client_of_\w+\.py, line 1"),
        ("exit('bye')\n", r"cannot be imported: SystemExit: bye \(client_of_\w+\.py:1\)$"),
        ("apq = 5\n", "has no 'app'"),
    ],
)
def test_an_app_that_cannot_be_imported_is_named_with_its_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(BadTask, match=reason):
        make_host(tmp_path, text)


def test_a_message_that_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    message = IncomingMessage(message_id="m1", kind="query", data=b"not records")
    response = make_host(tmp_path, QUERY_APP).handle(message)
    assert response.error is not None
    assert response.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_the_node_config_may_change_between_messages(tmp_path: Path) -> None:
    app = QUERY_APP.replace(
        "return Message(message.content",
        'message.content["config"]["rows"] = context.node_config["rows"]; return Message(message.content',
    )
    host = make_host(tmp_path, app)
    for rows in (1, 2):
        response = host.handle(make_message(content(), rows=rows))
        assert decode(response)["config"]["rows"] == rows
