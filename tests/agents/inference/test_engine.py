"""Which model answers a request that is pending when the comparison of two models ends."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from support.loaded_model import loaded_model

from fedbus.agents.inference.engine import InferenceEngine
from fedbus.agents.inference.model_pair import ComparisonRole
from fedbus.agents.inference.plain_json import HttpError
from fedbus.agents.inference.prediction_batch import Prediction

INPUTS = np.array([[7.0]], np.float32)


@pytest.fixture
async def engine() -> AsyncIterator[InferenceEngine]:
    engine = InferenceEngine()
    engine.serve(loaded_model(1))
    yield engine
    await engine.stop()


async def send_request(engine: InferenceEngine) -> asyncio.Task[Prediction]:
    """Send a request and return while it is in the queue."""
    request = asyncio.create_task(engine.predict(INPUTS, engine.choose_model()))
    await asyncio.sleep(0)
    assert engine.queue_length == 1
    return request


async def test_a_rolled_back_model_shows_no_error_to_pending_requests(engine: InferenceEngine) -> None:
    pair = engine.start_comparison(loaded_model(2, bad=7), ComparisonRole.WATCH)
    request = await send_request(engine)
    engine.roll_back(pair)
    assert (await request).ref.version == 1


async def test_a_failed_canary_shows_no_error_to_pending_requests(engine: InferenceEngine) -> None:
    pair = engine.start_comparison(loaded_model(2, bad=7), ComparisonRole.CANARY, share=1.0)
    request = await send_request(engine)
    engine.end_comparison(pair)
    assert (await request).ref.version == 1


async def test_a_late_batch_of_a_rolled_back_model_is_in_no_other_comparison(engine: InferenceEngine) -> None:
    pair = engine.start_comparison(loaded_model(2), ComparisonRole.WATCH)
    request = await send_request(engine)
    engine.roll_back(pair)
    other = engine.start_comparison(loaded_model(3), ComparisonRole.WATCH)
    assert (await request).ref.version == 2
    assert (other.samples, len(other.old_s)) == (0, 0)


async def test_a_model_that_passed_its_watch_has_no_fallback(engine: InferenceEngine) -> None:
    engine.end_comparison(engine.start_comparison(loaded_model(2, bad=7), ComparisonRole.WATCH))
    with pytest.raises(HttpError, match="prediction failed: failed on 7"):
        await engine.predict(INPUTS, engine.choose_model())
