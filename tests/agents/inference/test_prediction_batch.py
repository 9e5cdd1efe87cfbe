"""Which requests of a batch the model answers, which the fallback, and which fail."""

import numpy as np
from support.loaded_model import loaded_model

from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.agents.inference.prediction_batch import PendingRequest, Prediction, RequestFailed, run_batch


async def run(
    *samples: float, model: LoadedModel, fallback: LoadedModel | None = None
) -> tuple[list[tuple[float, int] | str], int]:
    """Run a batch of one request for each sample; return output and version, or the error, and the error count."""
    batch = [PendingRequest(np.array([[sample]]), model) for sample in samples]
    result = run_batch(batch, model, fallback)
    return [describe(one) for one in result.predictions], result.errors


def describe(result: Prediction | RequestFailed) -> tuple[float, int] | str:
    if isinstance(result, RequestFailed):
        return str(result)
    return float(result.outputs[0]), result.ref.version


async def test_an_invalid_request_fails_alone() -> None:
    answers, errors = await run(1, 13, 2, model=loaded_model())
    assert answers == [(1.0, 1), "prediction failed: failed on 13", (2.0, 1)]
    assert errors == 0


async def test_the_fallback_answers_what_the_new_model_fails() -> None:
    old, new = loaded_model(1, bad=7), loaded_model(2, offset=100)
    answers, errors = await run(1, 13, model=new, fallback=old)
    assert answers == [(101.0, 2), (13.0, 1)]
    assert errors == 1


async def test_a_request_that_both_models_fail_is_no_error_of_the_new_one() -> None:
    old, new = loaded_model(1), loaded_model(2)
    answers, errors = await run(13, model=new, fallback=old)
    assert answers == ["prediction failed: failed on 13"]
    assert errors == 0


async def test_an_answer_after_a_disconnect_is_dropped() -> None:
    model = loaded_model()
    request = PendingRequest(np.array([[1.0]]), model)
    request.prediction.cancel()
    request.answer(RequestFailed("too late"))
    assert request.prediction.cancelled()
