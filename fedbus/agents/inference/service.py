"""What the inference agent answers, whichever way it is asked: predictions, feedback, and what there is to know.

The plain JSON and the Open Inference Protocol come in here as bytes and leave as bytes; HTTP
(`inference_server`) and NATS (`inference`) only carry them. Large requests are taken apart in a
thread, so that the loop stays free for the small ones.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import numpy as np

from fedbus import __version__
from fedbus.agents.inference import open_inference_protocol as protocol
from fedbus.agents.inference.engine import InferenceEngine, LoadedModel, Prediction
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
from fedbus.stores.captured.reader import Label
from fedbus.stores.captured.store import CapturedData, LabelConflict, UnknownRow
from fedbus.stores.errors import StoreError

MAX_BODY_BYTES: Final = 4 * 1024**2
MAX_INPUTS: Final = 1024
"""Samples in one request."""
PLATFORM: Final = "fedbus"
_INLINE_BYTES: Final = 64 * 1024

Array: TypeAlias = np.ndarray[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")


class PredictionService:
    """Answers for one task, whose model is called *name*. What it was asked goes into *capture*, where there is one.

    *classes*: how many there are, where the task says so; else as many as the model tells apart, if it does.
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
        """The plain answer to a plain request. Raises Refusal."""
        served = self._engine.chosen()
        asked = await _run_off_loop(len(content), parse_samples, content, self._model_input(served))
        given = await self._engine.ask(asked.inputs, served)
        check_labels(asked.labels, self._classes_of(served))  # how many there are it may know only now
        ids = await _run_off_loop(asked.inputs.nbytes, self._capture_rows, asked.inputs, given, asked.labels)
        body = {"ids": ids, "outputs": given.outputs.tolist(), "model_version": given.ref.version}
        return json.dumps(body).encode()

    async def infer(
        self, content: bytes, json_bytes: int | None, model: str, version: str | None
    ) -> protocol.InferenceResponse:
        """The Open Inference Protocol's answer. Raises Refusal."""
        self._check_known(model, version)
        served = self._engine.chosen()
        asked = await _run_off_loop(
            len(content), protocol.parse_request, content, json_bytes, self._model_input(served)
        )
        given = await self._engine.ask(asked.inputs, served)
        unlabelled: list[Label | None] = [None] * len(asked.inputs)
        ids = await _run_off_loop(asked.inputs.nbytes, self._capture_rows, asked.inputs, given, unlabelled)
        return protocol.build_response(asked, given.outputs, ids, model=self._name, version=given.ref.version)

    async def feedback(self, row: int, content: bytes) -> None:
        """Keep what was true of the prediction *row*. Raises Refusal."""
        label = parse_label(content)
        check_labels([label], self._classes_of(self._engine.serving))
        with _translate_store_errors():
            await self._require_capture(row).label(row, label)

    async def withdraw(self, row: int) -> None:
        """Forget what was said to be true of the prediction *row*. Raises Refusal."""
        with _translate_store_errors():
            await self._require_capture(row).withdraw(row)

    def ready(self, model: str | None = None, version: str | None = None) -> dict[str, Any]:
        """Whether predictions are answered. Raises Refusal where not, or where it is not this model that answers."""
        if model is not None:
            self._check_known(model, version)
        return {"ready": True, "model_version": self._require_model().ref.version}

    def model(self) -> dict[str, Any]:
        """The version that answers, in full."""
        current = self._engine.current
        return {"model": current.model_dump(mode="json") if current else None}

    def build_model_metadata(self, model: str, version: str | None) -> dict[str, Any]:
        """What the Open Inference Protocol says of the model. Raises Refusal."""
        self._check_known(model, version)
        served = self._require_model()
        return protocol.build_metadata(
            self._name, served.ref.version, self._model_input(served), PLATFORM, served.gives
        )

    def build_server_metadata(self) -> dict[str, Any]:
        return {"name": PLATFORM, "version": __version__, "extensions": ["binary_tensor_data"]}

    # --- what each of them leans on ----------------------------------------------------------

    def _require_model(self) -> LoadedModel:
        if self._engine.serving is None:
            raise HttpError(
                SERVICE_UNAVAILABLE, "there is no model yet: ask again when /ready says so", retry_after_s=1
            )
        return self._engine.serving

    def _check_known(self, model: str, version: str | None) -> None:
        if model != self._name:
            raise HttpError(NOT_FOUND, f"there is no model {model!r} here: {self._name!r} is")
        now = self._engine.current
        if version is not None and now is not None and version != str(now.version):
            raise HttpError(NOT_FOUND, f"version {version} of {model} does not serve: {now.version} does")

    def _model_input(self, served: LoadedModel) -> ModelInput:
        return ModelInput(served.predictor.input_dtype, served.predictor.input_shape, self._max_inputs)

    def _capture_rows(self, inputs: Array, given: Prediction, labels: list[Label | None]) -> list[int | None]:
        if self._capture is None:
            return [None] * len(inputs)
        add, version = self._capture.add, given.ref.version
        return [
            add(sample, output, label, model_version=version)
            for sample, output, label in zip(inputs, given.outputs, labels, strict=True)
        ]

    def _require_capture(self, row: int) -> CapturedData:
        if self._capture is None:
            raise UnknownRow(row)
        return self._capture

    def _classes_of(self, served: LoadedModel | None) -> int | None:
        if self._classes is not None or served is None:
            return self._classes
        return served.predictor.classes


@contextmanager
def _translate_store_errors() -> Iterator[None]:
    """What the store says no to, as an answer."""
    try:
        yield
    except UnknownRow as error:
        raise HttpError(NOT_FOUND, str(error)) from error
    except LabelConflict as error:
        raise HttpError(CONFLICT, f"{error}; DELETE it to give another") from error
    except StoreError as error:
        raise HttpError(SERVICE_UNAVAILABLE, str(error), retry_after_s=1) from error


async def _run_off_loop(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do *work*, in a thread where it is enough to hold the loop up."""
    if size_bytes <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
