"""The prediction service: predictions, feedback and metadata, independent of the transport.

Requests and responses in plain JSON and in the Open Inference Protocol are bytes here; HTTP (`http_server`)
and NATS (`agent`) only transport them. Large requests are parsed in a thread, so that they do not block the
event loop.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import numpy as np

from fedbus import __version__
from fedbus.agents.inference import open_inference_protocol as protocol
from fedbus.agents.inference.engine import InferenceEngine
from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.agents.inference.plain_json import (
    CONFLICT,
    NOT_FOUND,
    SERVICE_UNAVAILABLE,
    HttpError,
    ModelInput,
    check_labels,
    parse_label,
    parse_samples,
)
from fedbus.agents.inference.prediction_batch import Prediction
from fedbus.stores.captured.reader import Label
from fedbus.stores.captured.store import CapturedData, LabelConflict, UnknownRow
from fedbus.stores.errors import StoreError

MAX_BODY_BYTES: Final = 4 * 1024**2
MAX_INPUTS: Final = 1024
"""Maximum number of samples in one request."""
PLATFORM: Final = "fedbus"
_INLINE_BYTES: Final = 64 * 1024

Array: TypeAlias = np.ndarray[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")


class PredictionService:
    """The service of one task, whose model has the name *name*; it adds all predictions to *capture*, if given.

    *classes* is the number of classes that the task declares; without it, the number of the model applies.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        capture: CapturedData | None = None,
        *,
        name: str = "model",
        max_inputs: int = MAX_INPUTS,
        classes: int | None = None,
    ) -> None:
        self._engine = engine
        self._capture = capture
        self._name = name
        self._max_inputs = max_inputs
        self._classes = classes

    async def predict(self, content: bytes) -> bytes:
        """Answer a request in plain JSON.

        Raises:
            HttpError: the request is invalid, or no model can answer it now.

        """
        model = self._engine.choose_model()
        samples = await _run_off_loop(len(content), parse_samples, content, self._model_input(model))
        prediction = await self._engine.predict(samples.inputs, model)
        check_labels(samples.labels, self._classes_of(model))  # known after the first prediction
        ids = await _run_off_loop(
            samples.inputs.nbytes, self._capture_rows, samples.inputs, prediction, samples.labels
        )
        body = {"ids": ids, "outputs": prediction.outputs.tolist(), "model_version": prediction.ref.version}
        return json.dumps(body).encode()

    async def infer(
        self, content: bytes, json_bytes: int | None, model: str, version: str | None
    ) -> protocol.InferenceResponse:
        """Answer a request of the Open Inference Protocol; *json_bytes* of *content* are JSON (None: all).

        Raises:
            HttpError: the request is invalid, or no model can answer it now.

        """
        self._check_known(model, version)
        loaded = self._engine.choose_model()
        request = await _run_off_loop(
            len(content), protocol.parse_request, content, json_bytes, self._model_input(loaded)
        )
        prediction = await self._engine.predict(request.inputs, loaded)
        no_labels: list[Label | None] = [None] * len(request.inputs)
        ids = await _run_off_loop(
            request.inputs.nbytes, self._capture_rows, request.inputs, prediction, no_labels
        )
        return protocol.build_response(
            request, prediction.outputs, ids, model=self._name, version=prediction.ref.version
        )

    async def feedback(self, row: int, content: bytes) -> None:
        """Store the label in *content* for the prediction *row*.

        Raises:
            HttpError: the label or the row is invalid, or the row has another label.

        """
        label = parse_label(content)
        check_labels([label], self._classes_of(self._engine.serving))
        with _translate_store_errors():
            await self._require_capture(row).label(row, label)

    async def remove_label(self, row: int) -> None:
        """Remove the label of the prediction *row*.

        Raises:
            HttpError: the row is unknown, or the store is unavailable.

        """
        with _translate_store_errors():
            await self._require_capture(row).remove_label(row)

    def check_ready(self, model: str | None = None, version: str | None = None) -> dict[str, Any]:
        """Return the readiness response.

        Raises:
            HttpError: no model is loaded, or *model* or *version* is not the served one.

        """
        if model is not None:
            self._check_known(model, version)
        return {"ready": True, "model_version": self._engine.require_model().ref.version}

    def describe_model(self) -> dict[str, Any]:
        """Return the reference of the served model, and why the newest version is not served, if it is not."""
        current = self._engine.current
        reason = {"not_served": self._engine.not_served} if self._engine.not_served else {}
        return {"model": current.model_dump(mode="json") if current else None} | reason

    def build_model_metadata(self, model: str, version: str | None) -> dict[str, Any]:
        """Return the model metadata of the Open Inference Protocol.

        Raises:
            HttpError: no model is loaded, or *model* or *version* is not the served one.

        """
        self._check_known(model, version)
        loaded = self._engine.require_model()
        return protocol.build_metadata(
            self._name, loaded.ref.version, self._model_input(loaded), PLATFORM, loaded.example_output
        )

    def build_server_metadata(self) -> dict[str, Any]:
        return {"name": PLATFORM, "version": __version__, "extensions": ["binary_tensor_data"]}

    # --- helpers -----------------------------------------------------------------------------

    def _check_known(self, model: str, version: str | None) -> None:
        if model != self._name:
            raise HttpError(NOT_FOUND, f"model {model!r} not found. This server serves {self._name!r}")
        current = self._engine.current
        if version is not None and current is not None and version != str(current.version):
            raise HttpError(
                NOT_FOUND,
                f"version {version} of {model} is not served. The served version is {current.version}",
            )

    def _model_input(self, model: LoadedModel) -> ModelInput:
        return ModelInput(model.predictor.input_dtype, model.predictor.input_shape, self._max_inputs)

    def _capture_rows(
        self, inputs: Array, prediction: Prediction, labels: list[Label | None]
    ) -> list[int | None]:
        if self._capture is None:
            return [None] * len(inputs)
        add, version = self._capture.add, prediction.ref.version
        return [
            add(sample, output, label, model_version=version)
            for sample, output, label in zip(inputs, prediction.outputs, labels, strict=True)
        ]

    def _require_capture(self, row: int) -> CapturedData:
        if self._capture is None:
            raise UnknownRow(row)
        return self._capture

    def _classes_of(self, model: LoadedModel | None) -> int | None:
        if self._classes is not None or model is None:
            return self._classes
        return model.predictor.classes


@contextmanager
def _translate_store_errors() -> Iterator[None]:
    """Translate errors of the store to HTTP errors."""
    try:
        yield
    except UnknownRow as error:
        raise HttpError(NOT_FOUND, str(error)) from error
    except LabelConflict as error:
        raise HttpError(CONFLICT, f"{error}; DELETE the label to send another") from error
    except StoreError as error:
        raise HttpError(SERVICE_UNAVAILABLE, str(error), retry_after_s=1) from error


async def _run_off_loop(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run *work*; in a thread if *size_bytes* is large enough to block the event loop."""
    if size_bytes <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
