"""The phases of a model swap as the clients of an inference agent see them."""

import numpy as np
import pytest
from support import eventually
from support.consumers import has_consumed_all
from support.federation import FederationHarness, RunningAgent
from support.inference_agent import NAME, model_file, predict, send_model, send_predictions, serve_with

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import InferReady, InferRefused, InferUpdate
from fedbus.contracts.serving import (
    ModelCanaried,
    ModelCommitted,
    ModelPrepared,
    ModelRejected,
    ModelRolledBack,
    ModelShadowed,
)
from fedbus.stores.captured.reader import count_rows


async def test_each_phase_of_a_swap_publishes_its_figures(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    url = fed.messages_of(InferReady)[0].endpoint
    for _ in range(3):
        await predict(url)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 3)
    await send_model(fed, InferUpdate, model_file(fed, 2))
    prepared = await fed.wait_for_message(ModelPrepared, times=2)
    assert (prepared.model.version, prepared.serving, prepared.probed, prepared.replayed) == (2, 1, 2, 3)
    committed = await fed.wait_for_message(ModelCommitted, times=2)
    assert (committed.model.version, committed.replaced) == (2, 1)


async def test_a_model_that_fails_on_captured_inputs_is_refused(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await predict(fed.messages_of(InferReady)[0].endpoint, 13, 0, 0)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 1)
    await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
    assert "last 1 captured inputs: failed on 13" in (await fed.wait_for_message(InferRefused)).reason
    assert (await fed.wait_for_message(ModelRejected)).step == "load"


async def test_a_model_with_a_lower_holdout_score_is_refused(fed: FederationHarness, consumers: None) -> None:
    async with serve_with(fed, **{"min-holdout": 10}) as url:
        for n in range(100):
            await predict(url, n, 0, 0, labels=[n])  # version 1 predicts these labels
        await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 100)
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert "labelled samples of this device" in (await fed.wait_for_message(InferRefused)).reason
        rejected = await fed.wait_for_message(ModelRejected)
        assert (rejected.step, rejected.old_score, rejected.serving) == ("holdout", 1.0, 1)
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 3, w=np.nextafter([1], [2], dtype=np.float32)))
        prepared = await fed.wait_for_message(ModelPrepared, times=2)
        assert [prepared.old_score, prepared.new_score] == pytest.approx([1.0, 1.0])
        assert prepared.holdout >= 10


async def test_in_shadow_users_get_the_answers_of_the_current_model(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 20}) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        shadowed = await fed.wait_for_message(ModelShadowed)
        assert shadowed.beside.samples >= 20
        assert shadowed.beside.disagreement == 1.0  # all outputs differ: they are twice as large
        assert shadowed.beside.old_ms is not None
        assert shadowed.beside.new_ms is not None
        await fed.wait_for_message(ModelCommitted, times=2)
        assert set(predictions) <= {(6.0, 1), (12.0, 2)}
        assert predictions.count((6.0, 1)) >= 20


async def test_a_shadow_model_that_disagrees_is_refused(fed: FederationHarness, consumers: None) -> None:
    table = {"shadow-samples": 10, "max-disagreement": 0.5}
    async with serve_with(fed, **table) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert (
            "predictions differ from the current model" in (await fed.wait_for_message(InferRefused)).reason
        )
        rejected = await fed.wait_for_message(ModelRejected)
        assert rejected.step == "shadow"
        assert rejected.beside is not None
        assert rejected.beside.disagreement == 1.0
        assert set(predictions) == {(6.0, 1)}


async def test_a_canary_answers_its_share_of_the_requests(fed: FederationHarness, consumers: None) -> None:
    table = {"canary-share": 0.25, "canary-samples": 10}
    async with serve_with(fed, **table) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        canaried = await fed.wait_for_message(ModelCanaried)
        await fed.wait_for_message(ModelCommitted, times=2)
        first = predictions.index((12.0, 2))
        during = predictions[first : first + 37]
        assert during.count((12.0, 2)) == 10
        assert (canaried.share, canaried.beside.errors) == (0.25, 0)


async def test_a_canary_that_fails_is_refused_and_users_see_no_error(
    fed: FederationHarness, consumers: None
) -> None:
    faulty = {"w": np.array([100], np.float32)}
    table = {"canary-share": 0.5, "canary-samples": 1000}
    async with serve_with(fed, **table) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, **faulty))
        await fed.wait_for_message(ModelPrepared, times=2)  # the probe and the captured inputs have no 13
        async with send_predictions(url, 13, 0, 0) as predictions:
            assert "failed on 13" in (await fed.wait_for_message(InferRefused)).reason
        rejected = await fed.wait_for_message(ModelRejected)
        assert rejected.step == "canary"
        assert rejected.beside is not None
        assert rejected.beside.errors >= 3
    assert set(predictions) == {(13.0, 1)}


async def test_a_new_model_with_errors_is_rolled_back_in_the_watch(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        assert await predict(url) == (600.0, 2)
        async with send_predictions(url, 13, 0, 0) as predictions:
            rolled_back = await fed.wait_for_message(ModelRolledBack)
            assert (rolled_back.model.version, rolled_back.returned_from.version) == (1, 2)
            assert rolled_back.beside.errors >= 3
            assert "failed on 13" in rolled_back.reason
            await fed.wait_for_event("inference", "model_returned")
        assert set(predictions) == {(13.0, 1)}
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        assert "this device rolled the model back" in (await fed.wait_for_message(InferRefused)).reason
        await send_model(fed, InferUpdate, model_file(fed, 3))
        await fed.wait_for_message(InferReady, times=3)
        assert await predict(url) == (18.0, 3)


async def test_a_rolled_back_model_is_tried_again_after_promotion(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed) as url:
        model = model_file(fed, 2, w=np.array([100], np.float32))
        await send_model(fed, InferUpdate, model, term=7)
        await fed.wait_for_message(InferReady, times=2)
        async with send_predictions(url, 13, 0, 0):
            await fed.wait_for_message(ModelRolledBack)
            await fed.wait_for_event("inference", "model_returned")
        await send_model(fed, InferUpdate, model, term=7)
        assert (
            "try it again, run: fedbus model promote 2" in (await fed.wait_for_message(InferRefused)).reason
        )
        await send_model(fed, InferUpdate, model, term=8)
        reason = (await fed.wait_for_message(InferRefused, times=2)).reason
        assert reason.endswith("captured inputs: failed on 13")


async def test_a_new_model_with_prediction_drift_is_rolled_back(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"max-answer-psi": 0.5, "min-answers": 20}) as url:
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([50], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        rolled_back = await fed.wait_for_message(ModelRolledBack)
        assert "distribution of predictions differs" in rolled_back.reason
        assert rolled_back.beside.answer_psi is not None
        assert rolled_back.beside.answer_psi > 0.5
        await fed.wait_for_event("inference", "model_returned")


async def test_of_models_requested_during_a_swap_the_newest_is_served(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 1, "shadow-s": 60.0}) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        await fed.wait_for_state("inference", "updating")  # until the first prediction ends the shadow phase
        for version in (3, 4, 5):
            await send_model(fed, InferUpdate, model_file(fed, version))
        await eventually(lambda: has_consumed_all(fed, NAME, AgentName.INFERENCE))
        await eventually(lambda: is_serving(url, 5))
        await fed.wait_until(
            lambda: fed.messages_of(ModelCommitted)[-1].model.version == 5
        )  # published after it serves
    assert [committed.model.version for committed in fed.messages_of(ModelCommitted)] == [1, 2, 5]


async def is_serving(url: str, version: int) -> bool:
    return (await predict(url))[1] == version
