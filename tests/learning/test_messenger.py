"""What the messenger records of replies: the values of one client are limited."""

import pytest
from flwr.app import MetricRecord, RecordDict

from fedbus.contracts.run import RunPlan
from fedbus.learning.flower.replies import sample_count
from fedbus.learning.library import ClientReply, OutgoingMessage
from fedbus.learning.memory_bus import MemoryBus
from fedbus.learning.messenger import MAX_FAILURE_CHARS, MAX_SAMPLES, BusMessenger
from fedbus.learning.payload import Payload


async def test_the_reason_and_samples_of_one_client_are_limited() -> None:
    """Otherwise the result of the round could be too large to be published, and the run would fail."""
    messenger = BusMessenger(MemoryBus(), task="mnist", run="run-1", plan=RunPlan())
    request = OutgoingMessage(client="c1", kind="train", payload=Payload.pack([]))
    reply = ClientReply(request=request, round=1)

    messenger.reject(reply, "c1: " + "x" * 1_000_000)
    assert messenger.tally(1).failures == {"c1": "x" * MAX_FAILURE_CHARS}
    messenger.accept(reply, samples=10**400)
    assert messenger.tally(1).participants == {"c1": MAX_SAMPLES}
    messenger.accept(reply, samples=-1)
    assert messenger.tally(1).participants == {"c1": 0}


@pytest.mark.parametrize("count", [float("inf"), float("-inf"), float("nan")])
def test_a_number_of_examples_that_is_not_finite_counts_as_zero(count: float) -> None:
    assert sample_count(RecordDict({"metrics": MetricRecord({"num-examples": count})})) == 0
