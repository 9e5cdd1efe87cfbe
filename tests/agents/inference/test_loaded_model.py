"""How many samples fit into the next batch of a model, and which outputs a device accepts."""

import numpy as np
import pytest
from support.loaded_model import loaded_model

from fedbus.agents.inference.loaded_model import INITIAL_BATCH, MAX_BATCH, LoadedModel, check_outputs


@pytest.fixture
def model() -> LoadedModel:
    return loaded_model()


def test_a_full_fast_batch_doubles_the_next_one(model: LoadedModel) -> None:
    model.record_batch(0.01, INITIAL_BATCH, 0.05)
    assert model.batch_limit == 2 * INITIAL_BATCH
    model.record_batch(0.01, INITIAL_BATCH - 1, 0.05)
    assert model.batch_limit == 2 * INITIAL_BATCH, "a batch that is less than half full"


def test_a_batch_has_a_maximum_size(model: LoadedModel) -> None:
    for _ in range(10):
        model.record_batch(0.01, model.batch_limit, 0.05)
    assert model.batch_limit == MAX_BATCH


def test_a_slow_batch_shrinks_the_next_one_to_its_time(model: LoadedModel) -> None:
    model.record_batch(0.1, 20, 0.05)
    assert model.batch_limit == 10
    model.record_batch(9.0, 1, 0.05)
    assert model.batch_limit == 1


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([1.0], "1 outputs for 2 samples"),
        ([1.0, np.nan], "NaN or infinity"),
        ([1.0, np.inf], "NaN or infinity"),
    ],
)
def test_outputs_that_no_user_may_get_are_refused(outputs: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_outputs(np.array(outputs), 2)
