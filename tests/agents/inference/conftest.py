"""A running inference agent, empty or with a model."""

from collections.abc import AsyncIterator

import pytest
from support.federation import TASK, FederationHarness, RunningAgent
from support.inference_agent import NAME, make_agent, model_file, send_model

from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.client import InferReady, InferStart


@pytest.fixture
async def consumers(fed: FederationHarness) -> None:
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client=NAME)


@pytest.fixture
async def inference(fed: FederationHarness, consumers: None) -> AsyncIterator[RunningAgent]:
    """An inference agent without a model."""
    async with fed.run_agent(make_agent(fed.client_config(NAME))) as agent:
        await fed.wait_for_state("inference", "empty")
        yield agent


@pytest.fixture
async def serving(fed: FederationHarness, inference: RunningAgent) -> RunningAgent:
    """An inference agent that serves version 1, whose weight is 1."""
    await send_model(fed, InferStart, model_file(fed, 1))
    await fed.wait_for_message(InferReady)
    await fed.wait_for_event("inference", "infer_start")  # transitions come from another stream
    return inference
