"""The client side: trains and evaluates with the functions of the task, and keeps their data and state."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from fedbus.contracts.run import Scalar
from fedbus.learning.compression import BadEncoding, make_encoding
from fedbus.learning.functions.compressed_weights import ENCODINGS_KEY, UpdateCompressor
from fedbus.learning.functions.message_codec import BadContent, Content, decode, encode
from fedbus.learning.functions.signatures import FunctionName
from fedbus.learning.functions.task_module import Config, FunctionFailed, TaskModule
from fedbus.learning.functions.updates import BadUpdate, Weights, check_same_arrays
from fedbus.learning.library import (
    CAPTURED_DATA_KEY,
    MAX_REASON_CHARS,
    ClientJob,
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    ReplyError,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_metrics import normalize_metrics

GLOBAL_WEIGHTS_KEY: Final = "global-weights"
PROXIMAL_MU_KEY: Final = "proximal-mu"

log = structlog.get_logger("fedbus.learning")


class FunctionsClient:
    """The client side of one run on one device."""

    def __init__(self, job: ClientJob, module: TaskModule) -> None:
        self._job = job
        self._module = module
        self._data = _DataCache(job, module)
        self._state: dict[str, Any] = {}
        """The ``state`` of the functions."""
        encoding = make_encoding(job.task.table.compression)
        self._compressor = None if encoding is None else UpdateCompressor(encoding)

    def handle(self, message: IncomingMessage) -> ClientResponse:
        """Train or evaluate with the weights of *message*."""
        try:
            request = decode(message.data)
            return self._answer(message, request)
        except BadContent as error:
            return _refuse(ErrorCode.MESSAGE_UNAVAILABLE, str(error), type(error).__name__)
        except FunctionFailed as error:
            log.warning("A function of the task failed", round=message.round, exc_info=error.__cause__)
            return _refuse(ErrorCode.CODE_RAISED, str(error), error.kind)

    def close(self) -> None:
        """Do nothing: the session holds only memory."""

    def _answer(self, message: IncomingMessage, request: Content) -> ClientResponse:
        config = self._config(request)
        weights = {name: np.array(array) for name, array in request.weights.items()}
        data = self._data.get(message.node_config, config)
        match message.kind.partition(".")[0]:
            case "train":
                new_weights, metrics, num_examples = self._module.train(weights, data, config, self._state)
                trained = self._check(new_weights, request.weights)
                return self._respond_with_update(metrics, num_examples, trained, request.weights)
            case "evaluate":
                metrics, num_examples = self._module.evaluate(weights, data, config, self._state)
                return _respond("eval_", metrics, num_examples, {})
            case kind:
                return _refuse(
                    ErrorCode.UNKNOWN, f"there is no function for messages of kind {kind!r}", "UnknownKind"
                )

    def _respond_with_update(
        self, metrics: dict[str, float], num_examples: int, trained: Weights, reference: Weights
    ) -> ClientResponse:
        if self._compressor is None:
            return _respond("train_", metrics, num_examples, trained)
        try:
            sent, encodings = self._compressor.encode(trained, reference)
        except BadEncoding as error:
            raise self._module.fail(FunctionName.TRAIN, str(error)) from None
        return _respond("train_", metrics, num_examples, sent, {ENCODINGS_KEY: encodings})

    def _config(self, request: Content) -> Config:
        config: Config = {**self._job.config, **dict(request.values.get("config", {}))}
        if PROXIMAL_MU_KEY in config:
            config[GLOBAL_WEIGHTS_KEY] = request.weights
        return config

    def _check(self, weights: Weights, global_weights: Weights) -> Weights:
        """Return a copy of the update, which the task's code may change in the next round. Raises FunctionFailed."""
        if global_weights and not self._module.has(FunctionName.AGGREGATE):
            try:
                check_same_arrays(weights, global_weights)
            except BadUpdate as error:
                raise self._module.fail(FunctionName.TRAIN, str(error)) from None
        return {name: np.array(array) for name, array in weights.items()}


class _DataCache:
    """The data of the client: loaded before the first message, and again when the device has new captured data."""

    def __init__(self, job: ClientJob, module: TaskModule) -> None:
        self._job = job
        self._module = module
        self._uses_captured = any(
            module.takes(FunctionName.LOAD, name) for name in ("captured", "node_config")
        )
        self._version: tuple[int, int] | None = None
        """Time and size of the captured data in the loaded data; None if it has none."""
        self._is_loaded = False
        self._data: Any = None

    def get(self, node_config: Mapping[str, Scalar], config: Config) -> Any:
        """Return the data. Raises FunctionFailed."""
        captured = str(node_config.get(CAPTURED_DATA_KEY, ""))
        version = _version_of(captured) if captured and self._uses_captured else self._version
        if not self._is_loaded or version != self._version:
            self._data = self._load(node_config, captured, config)
            self._version, self._is_loaded = version, True
        return self._data

    def _load(self, node_config: Mapping[str, Scalar], captured: str, config: Config) -> Any:
        values: dict[str, Any] = {
            "partition_id": int(node_config.get("partition-id", 0)),
            "num_partitions": int(node_config.get("num-partitions", 1)),
            "node_config": dict(node_config),
            "config": config,
            "captured": _read_captured(captured),
        }
        return self._module.load(values)


def _read_captured(path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    if not path or not Path(path).is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return file["inputs"], file["labels"]


def _version_of(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)  # noqa: PTH116 - no Path is needed
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _respond(
    prefix: str,
    metrics: dict[str, float],
    num_examples: int,
    weights: Weights,
    values: Mapping[str, Any] | None = None,
) -> ClientResponse:
    content = Content({"metrics": metrics, "num-examples": num_examples, **(values or {})}, weights)
    return ClientResponse(
        payload=Payload.pack(encode(content)), metrics=normalize_metrics(metrics, prefix=prefix)
    )


def _refuse(code: ErrorCode, reason: str, kind: str) -> ClientResponse:
    return ClientResponse(error=ReplyError(code, " ".join(reason.split())[:MAX_REASON_CHARS], kind))
