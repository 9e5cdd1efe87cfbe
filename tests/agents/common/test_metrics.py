"""Metrics that an undisturbed run does not produce: failed updates, and predictions."""

import aiohttp
import numpy as np
from opentelemetry.sdk.metrics.export import NumberDataPoint
from support.recorded_telemetry import enable_metrics, own_metrics, record_spans

from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.server_manager.run_metrics import MAX_METRICS, record_round
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RoundResult

MODEL = ModelRef(version=3, sha256="3" * 64, size_bytes=1, architecture="0" * 64)


class DoublingPredictor:
    """A model that doubles."""

    input_shape: tuple[int, ...] | None = (1,)
    input_dtype = np.dtype(np.float32)
    classes: int | None = None

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return inputs * 2


def metric_points(name: str) -> list[dict[str, object]]:
    return [dict(point.attributes or {}) for point in own_metrics()[name].data.data_points]


async def test_predictions_are_measured_with_a_traced_example() -> None:
    enable_metrics()
    server = InferenceServer(name="doubler", client="c9")
    await server.load(MODEL, DoublingPredictor)
    url = await server.start()
    try:
        with record_spans() as spans:
            async with aiohttp.ClientSession() as session:
                for _ in range(3):
                    async with session.post(f"{url}/predict", json={"inputs": [[1.0]]}) as answer:
                        assert answer.status == 200
    finally:
        await server.stop()

    # one read only: reading resets the exemplars
    measured = own_metrics()["fedbus.prediction.duration"].data.data_points
    expected = {"fedbus.task": "doubler", "fedbus.client": "c9", "http.response.status_code": "200"}
    assert expected in [dict(point.attributes or {}) for point in measured]
    traced = [span for span in spans.get_finished_spans() if span.name == "predict"]
    assert 1 <= len(traced) <= 2, "one trace a second, however many predictions"
    assert traced[0].parent is None
    assert dict(traced[0].attributes or {})["fedbus.model.version"] == 3
    examples = [one.trace_id for point in measured for one in point.exemplars]
    assert traced[0].context
    assert traced[0].context.trace_id in examples


async def test_a_device_without_a_model_has_version_0() -> None:
    enable_metrics()
    server = InferenceServer(name="idle", client="c8")
    await server.start()
    try:
        assert served_versions("idle") == [0]
        await server.load(MODEL, DoublingPredictor)
        assert served_versions("idle") == [3]
    finally:
        await server.stop()
    metrics = own_metrics()
    assert "fedbus.served.version" not in metrics or served_versions("idle") == []


def served_versions(task: str) -> list[float]:
    points = own_metrics()["fedbus.served.version"].data.data_points
    return [
        point.value
        for point in points
        if isinstance(point, NumberDataPoint) and dict(point.attributes or {})["fedbus.task"] == task
    ]


def test_failed_updates_are_counted_and_metrics_are_limited() -> None:
    enable_metrics()
    metrics = {f"m{number:03}": float(number) for number in range(50)} | {"broken": float("nan")}
    record_round("figures", RoundResult(round=1, seconds=1.0, metrics=metrics, failures={"c1": "no power"}))

    assert {"fedbus.task": "figures"} in metric_points("fedbus.round.failures")
    recorded = [one for one in metric_points("fedbus.round.metric") if one["fedbus.task"] == "figures"]
    assert len(recorded) <= MAX_METRICS
    assert "broken" not in {one["fedbus.metric"] for one in recorded}


def test_the_initial_model_of_a_run_is_not_counted_as_a_round() -> None:
    enable_metrics()
    record_round("round-0", RoundResult(round=0, seconds=1.0, metrics={"loss": 2.0}))

    assert {"fedbus.task": "round-0", "fedbus.metric": "loss"} in metric_points("fedbus.round.metric")
    assert "fedbus.rounds" not in own_metrics() or {"fedbus.task": "round-0"} not in metric_points(
        "fedbus.rounds"
    )
