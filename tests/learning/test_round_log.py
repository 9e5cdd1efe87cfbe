"""The result of a round: an evaluation that fails on all clients."""

from pathlib import Path

import pytest
from learning.flower.memory_bus import CLIENT_APP, initial_model, open_memory_federation, render_server_app

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import ClientReply, OutgoingMessage, RoundTally
from fedbus.learning.memory_bus import MemoryBus
from fedbus.learning.messenger import MAX_FAILURE_CHARS, BusMessenger
from fedbus.learning.payload import Payload
from fedbus.learning.round_log import MAX_EVALUATION_FAILURE_CHARS, describe_evaluation_failure

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
