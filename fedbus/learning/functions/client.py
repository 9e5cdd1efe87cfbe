"""The client side: trains and evaluates with the functions of the task, and keeps their data and state."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from fedbus.contracts.run import Scalar
from fedbus.learning.compression import BadEncoding, make_encoding
from fedbus.learning.functions.compressed_weights import ENCODINGS_KEY, UpdateCompressor, decode_weights
from fedbus.learning.functions.message_codec import BadContent, Content, decode, encode
from fedbus.learning.functions.signatures import FunctionName
from fedbus.learning.functions.task_module import Config, FunctionFailed, TaskModule
from fedbus.learning.functions.update_sum import FunctionsUpdateSum
from fedbus.learning.functions.updates import BadUpdate, Weights, check_same_arrays
from fedbus.learning.library import (
    CAPTURED_DATA_KEY,
    MAX_REASON_CHARS,
    ClientJob,
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    ReplyError,
    StateNotMovable,
    UpdateSum,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_metrics import normalize_metrics
from fedbus.learning.task_code import format_error

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
        return self._handle(message, None)

    def handle_in_sum(self, message: IncomingMessage, update_sum: UpdateSum) -> ClientResponse:
        """Do the same, and add the update to *update_sum*."""
        assert isinstance(update_sum, FunctionsUpdateSum)
        return self._handle(message, update_sum)

    @property
    def has_state(self) -> bool:
        """Whether the functions have kept something in ``state``."""
        return bool(self._state) or (self._compressor is not None and bool(self._compressor.errors))

    def dump_state(self) -> bytes | None:
        """Return ``state``, pickled; None if there is none. Raises StateNotMovable."""
        if not self.has_state:
            return None
        errors = {} if self._compressor is None else self._compressor.errors
        try:
            return pickle.dumps((self._state, errors), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise StateNotMovable(f"`state` cannot be pickled: {format_error(error)}") from error

    def load_state(self, state: bytes) -> None:
        """Set ``state``, which this library has pickled in a process of the same simulation."""
        self._state, errors = pickle.loads(state)  # noqa: S301
        if self._compressor is not None:
            self._compressor.errors = errors

    def _handle(self, message: IncomingMessage, update_sum: FunctionsUpdateSum | None) -> ClientResponse:
        state = dict(self._state)
        try:
            return self._answer(message, _decode(message), update_sum)
        except BadContent as error:
            return _refuse(ErrorCode.MESSAGE_UNAVAILABLE, str(error), type(error).__name__)
        except FunctionFailed as error:
            self._state.clear()  # the same dict, without the entries of the message that failed
            self._state.update(state)
            log.warning("A function of the task failed", round=message.round, exc_info=error.__cause__)
            return _refuse(ErrorCode.CODE_RAISED, str(error), error.kind)

    def close(self) -> None:
        """Do nothing: the session holds only memory."""

    def _answer(
        self, message: IncomingMessage, request: Content, update_sum: FunctionsUpdateSum | None
    ) -> ClientResponse:
        config = self._config(request)
        weights = {name: np.array(array) for name, array in request.weights.items()}
        data = self._data.get(message.node_config, config)
        match message.kind.partition(".")[0]:
            case "train":
                new_weights, metrics, num_examples = self._module.train(weights, data, config, self._state)
                trained = self._check(new_weights, request.weights, copies=update_sum is None)
                if update_sum is not None:
                    self._add(update_sum, trained, num_examples, request.weights)
                    return _respond("train_", metrics, num_examples, {})
                return self._respond_with_update(metrics, num_examples, trained, request.weights)
            case "evaluate":
                metrics, num_examples = self._module.evaluate(weights, data, config, self._state)
                return _respond("eval_", metrics, num_examples, {})
            case kind:
                return _refuse(
                    ErrorCode.UNKNOWN, f"there is no function for messages of kind {kind!r}", "UnknownKind"
                )

    def _add(
        self, update_sum: FunctionsUpdateSum, trained: Weights, num_examples: int, reference: Weights
    ) -> None:
        """Add the update as the server would get it: with the loss of its compression."""
        if self._compressor is not None:
            try:
                trained = decode_weights(*self._compressor.encode(trained, reference), reference)
            except (BadEncoding, BadContent) as error:
                raise self._module.fail(FunctionName.TRAIN, str(error)) from None
        update_sum.add(trained, num_examples)

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
            config[GLOBAL_WEIGHTS_KEY] = dict(request.weights)
        return config

    def _check(self, weights: Weights, global_weights: Weights, *, copies: bool) -> Weights:
        """Return the update, with *copies* of arrays that the task's code may change later. Raises FunctionFailed."""
        if global_weights and not self._module.has(FunctionName.AGGREGATE):
            try:
                check_same_arrays(weights, global_weights)
            except BadUpdate as error:
                raise self._module.fail(FunctionName.TRAIN, str(error)) from None
        return {name: np.array(array) for name, array in weights.items()} if copies else weights


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


def _decode(message: IncomingMessage) -> Content:
    """Decode the content of *message*, once for all clients with a common cache. Raises BadContent."""
    if message.cache is None:
        return decode(message.data)
    content = message.cache.get("content")
    if content is None:
        content = message.cache["content"] = decode(message.data)
    assert isinstance(content, Content)
    return content


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
        payload=Payload.pack(encode(content)),
        metrics=normalize_metrics(metrics, prefix=prefix),
        samples=num_examples,
    )


def _refuse(code: ErrorCode, reason: str, kind: str) -> ClientResponse:
    return ClientResponse(error=ReplyError(code, " ".join(reason.split())[:MAX_REASON_CHARS], kind))
