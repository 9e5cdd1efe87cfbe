"""The result of a round: an evaluation that fails on all clients."""

from contextlib import nullcontext
from pathlib import Path
from textwrap import dedent

import pytest
from learning.flower.memory_bus import CLIENT_APP, initial_model, open_memory_federation, render_server_app

from fedbus.contracts.run import RunPlan
from fedbus.contracts.task.aggregation import AggregationMode
from fedbus.learning.aggregation_planner import AggregationReport
from fedbus.learning.library import ClientReply, NoUpdates, OutgoingMessage, RoundTally
from fedbus.learning.memory_bus import MemoryBus
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.payload import Payload
from fedbus.learning.round_log import MAX_EVALUATION_FAILURE_CHARS, RoundLog, describe_evaluation_failure
from fedbus.learning.round_tallies import MAX_FAILURE_CHARS

EVALUATE = CLIENT_APP[CLIENT_APP.index("    @app.evaluate()") :]
RAISES = """
    @app.evaluate()
    def evaluate(message, context):
        raise ValueError("no data")
"""


def reply(client: str, kind: str) -> ClientReply:
    request = OutgoingMessage(client=client, kind=kind, payload=Payload.pack([]))
    return ClientReply(request=request, round=1)


async def test_the_messenger_separates_failures_of_an_evaluation() -> None:
    messenger = BusMessenger(MemoryBus(), task="mnist", run="run-1", plan=RunPlan())
    messenger.accept(reply("c1", "train"), samples=5)
    messenger.reject(reply("c1", "evaluate"), "c1: no data")
    messenger.reject(reply("c2", "train"), "killed")
    assert messenger.tally(1).evaluation_failures == {"c1": "no data"}
    assert messenger.tally(1).failures == {"c1": "no data", "c2": "killed"}
    assert describe_evaluation_failure(messenger.tally(1))
    messenger.accept(reply("c3", "evaluate"))
    assert describe_evaluation_failure(messenger.tally(1)) == ""


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        ({}, ""),
        ({"c1": "no data"}, "no client could evaluate the model: c1: no data"),
        ({"c2": "x", "c1": "no data"}, "no client could evaluate the model: c1: no data (and 1 more client)"),
        ({"c3": "x", "c2": "x", "c1": "y"}, "no client could evaluate the model: c1: y (and 2 more clients)"),
    ],
)
def test_the_failure_of_an_evaluation_names_a_client(failures: dict[str, str], text: str) -> None:
    assert describe_evaluation_failure(RoundTally(evaluation_failures=failures)) == text


def test_the_failure_of_an_evaluation_is_limited() -> None:
    """Each round of a run has one, and all rounds are in one transition."""
    tally = RoundTally(evaluation_failures=dict.fromkeys(("c1", "c2"), "x" * MAX_FAILURE_CHARS))
    text = describe_evaluation_failure(tally)
    assert len(text) == MAX_EVALUATION_FAILURE_CHARS
    assert text.endswith("xx (and 1 more client)")


FAILS = """
        if message.content["config"]["server-round"] in FAILING:
            raise ValueError("no data")
"""
TRAIN_FAILS = CLIENT_APP.replace("        seen = ", f"{FAILS}        seen = ")


@pytest.mark.parametrize("method", ["streaming", "stock"])
async def test_a_flower_run_without_any_update_fails(tmp_path: Path, method: str) -> None:
    client = TRAIN_FAILS.replace("FAILING", "(1, 2)")
    server = render_server_app("FedAvg()")
    async with open_memory_federation(tmp_path, server=server, client=client) as federation:
        for name in ("c1", "c2"):
            federation.add(name, step=1.0, samples=1)
        with pytest.raises(NoUpdates, match=r"in any round: c\d: .*ValueError: no data .*failed too: c\d"):
            await federation.run(
                initial_model(), run_config={"num-server-rounds": 2}, aggregation={"method": method}
            )
    assert [sorted(result.failures) for result in federation.results if result.round] == [["c1", "c2"]] * 2


async def test_a_flower_run_with_an_update_in_one_round_is_complete(tmp_path: Path) -> None:
    client = TRAIN_FAILS.replace("FAILING", "(1,)")
    async with open_memory_federation(
        tmp_path, server=render_server_app("FedAvg()"), client=client
    ) as federation:
        for name in ("c1", "c2"):
            federation.add(name, step=1.0, samples=1)
        await federation.run(initial_model(), run_config={"num-server-rounds": 2})
    assert [len(result.participants) for result in federation.results if result.round] == [0, 2]


@pytest.mark.parametrize(
    ("late", "reason"), [(0, None), (3, "no round has an update: 3 came after the deadline .*late = ")]
)
def test_a_run_whose_updates_all_are_late_fails(late: int, reason: str | None) -> None:
    log = RoundLog({}, run="run-1", first_round=1, tally=lambda _: RoundTally(), on_round=lambda _, __: None)
    log.set_aggregation(AggregationReport(AggregationMode.DEADLINE, late_dropped=late))
    log.end_round(1)
    with pytest.raises(NoUpdates, match=reason) if reason else nullcontext():
        log.check_updates()


@pytest.mark.parametrize(
    ("evaluate", "strategy", "failure"),
    [
        (
            RAISES,
            "FedAvg()",
            "no client could evaluate the model: c1: the ClientApp raised ValueError: no data",
        ),
        (RAISES, "FedAvg(fraction_evaluate=0.0)", ""),
        (EVALUATE, "FedAvg()", ""),
        ("", "FedAvg()", ""),
    ],
    ids=["every client fails", "no client has to evaluate", "every client evaluates", "no evaluate function"],
)
async def test_a_round_of_a_flower_app_has_the_failure_of_its_evaluation(
    tmp_path: Path, evaluate: str, strategy: str, failure: str
) -> None:
    client = CLIENT_APP.replace(EVALUATE, evaluate)
    async with open_memory_federation(
        tmp_path, rounds=1, server=render_server_app(strategy), client=client
    ) as federation:
        federation.add("c1", step=1, samples=1)
        federation.add("c2", step=1, samples=1)
        await federation.run(initial_model())
    result = federation.results[-1]
    assert result.evaluation_failure.startswith(failure)
    assert bool(result.evaluation_failure) == bool(failure)
    assert result.participants == {"c1": 1, "c2": 1}


QUERY_OR_FAIL = """
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message, context):
        if context.node_config["samples"] == 0:
            raise ValueError("no data")
        metrics = MetricRecord({"count": context.node_config["samples"]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""
ANALYTICS = """
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        content = RecordDict({"config": ConfigRecord()})
        messages = [Message(content, node, "query", group_id="GROUP") for node in grid.get_node_ids()]
        replies = [reply for reply in grid.send_and_receive(messages) if reply.has_content()]
        total = sum(reply.content["metrics"]["count"] for reply in replies)
        context.state["metrics"] = MetricRecord({"total": total, "centralized_loss": 0.5})
"""


@pytest.mark.parametrize(("group", "number"), [("", 1), ("4", 4)])
async def test_metrics_in_the_state_are_those_of_a_run_without_a_strategy(
    tmp_path: Path, group: str, number: int
) -> None:
    """Federated analytics: the run has no model, and the metrics belong to its version."""
    server = dedent(ANALYTICS).replace("GROUP", group)
    async with open_memory_federation(tmp_path, server=server, client=QUERY_OR_FAIL) as federation:
        for client, samples in {"c1": 3, "c2": 4, "c3": 0}.items():
            federation.add(client, samples=samples)
        assert await federation.run({}) == {}
    (result,) = federation.results
    assert (result.round, result.metrics) == (number, {"total": 7, "loss": 0.5})
    assert result.participants == {"c1": 0, "c2": 0}
    assert list(result.failures) == ["c3"]


async def test_metrics_in_the_state_belong_to_the_result_of_an_own_loop(tmp_path: Path) -> None:
    server = dedent(ANALYTICS).replace(
        "context.state[",
        'context.state["fedbus.result"] = ArrayRecord({"w": Array(np.ones(3))}); context.state[',
        1,
    )
    server = "import numpy as np\nfrom flwr.app import Array, ArrayRecord\n" + server
    async with open_memory_federation(tmp_path, server=server, client=QUERY_OR_FAIL) as federation:
        federation.add("c1", samples=3)
        final = await federation.run({})
    ((result, arrays),) = federation.rounds
    assert result.metrics == {"total": 3, "loss": 0.5}
    assert arrays["w"].tolist() == final["w"].tolist() == [1, 1, 1]
