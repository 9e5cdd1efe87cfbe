"""The private API of Flower that fedbus uses, checked when this module is imported (`flower_version`).

`tests/learning/flower/test_private_api.py` fails if Flower changes the behaviour of one of them; then this module
changes. `make test-flower VERSION=…` runs the tests against another version of Flower.

    set_process_identity    `Message(content, dst_node_id, message_type)` reads a process-wide identity on the server
    set_message_id          the metadata of a message that the Grid sends has no setter for its id
    build_message           a received message is built from its metadata, for which there is no public constructor
    empty_run               legacy `server_fn` apps read a `Run` from the Grid, which has no public constructor
    install_fast_records    an ArrayRecord copies each array twice, and writes headers by a general and slow way; the
                            views of a RecordDict by kind check and copy each record
    BorrowedArray           an `Array` copies its data to `bytes`; this one uses a buffer that it does not own
    RunNotRunningException  ends Flower's background threads when a Grid is closed
    check_replies           streaming aggregation lets Flower check and log replies whose arrays are released
    error codes, aggregate_metricrecords, KEY_CLIPPING_NORM, SECAGG_CONFIGS: they have no public name
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, cast

import numpy as np

from fedbus.learning import npy
from fedbus.learning.flower import flower_version

with flower_version.checked_imports():
    from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
    from flwr.app.message.message import make_message
    from flwr.app.message.recorddict import _SyncedDict
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
    from flwr.server.server import Server
    from flwr.server.workflow import DefaultWorkflow
    from flwr.serverapp.strategy import FedAvg, Strategy
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
    from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supercore.task_identity import TaskIdentity

_ATTRIBUTES: Final[dict[Any, tuple[str, ...]]] = {
    ErrorCode: (
        "UNKNOWN",
        "LOAD_CLIENT_APP_EXCEPTION",
        "CLIENT_APP_RAISED_EXCEPTION",
        "MESSAGE_UNAVAILABLE",
        "NODE_UNAVAILABLE",
        "REPLY_MESSAGE_UNAVAILABLE",
    ),
    SType: ("NUMPY",),
    Run: ("create_empty",),
    TaskIdentity: ("task_id", "run_id", "node_id"),
    ArrayRecord: ("from_torch_state_dict",),
    FedAvg: ("_check_and_log_replies", "aggregate_train"),
    Strategy: ("start",),  # the hooks replace this one and the next two
    Server: ("fit",),
    DefaultWorkflow: ("__call__",),
}
for _owner, _names in _ATTRIBUTES.items():
    flower_version.require_attributes(_owner, _names)
flower_version.require_attributes(_SyncedDict(RecordDict(), ArrayRecord), ("_data",))
flower_version.require_attributes(Metadata(1, "", 1, 1, "", "", 0.0, 1.0, "train"), ("_message_id",))

__all__ = [
    "CHECK_REPLIES",
    "CLIENT_APP_RAISED",
    "KEY_CLIPPING_NORM",
    "LOAD_CLIENT_APP_FAILED",
    "MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
    "NO_REPLY",
    "NUMPY",
    "SECAGG_CONFIGS",
    "SERVER_NODE_ID",
    "SYSTEM_MESSAGE_TYPE",
    "UNKNOWN_ERROR",
    "BorrowedArray",
    "Run",
    "RunNotRunningException",
    "UnserializedArray",
    "aggregate_metricrecords",
    "array_view",
    "build_message",
    "check_replies",
    "checks_replies_as_flower",
    "empty_run",
    "install_fast_records",
    "make_array",
    "serialized_buffer",
    "set_message_id",
    "set_process_identity",
]

SERVER_NODE_ID: Final[int] = SUPERLINK_NODE_ID
NUMPY: Final[str] = SType.NUMPY
SECAGG_CONFIGS: Final[str] = RECORD_KEY_CONFIGS
"""The record of a message with a step of secure aggregation."""

UNKNOWN_ERROR: Final[int] = ErrorCode.UNKNOWN
LOAD_CLIENT_APP_FAILED: Final[int] = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
CLIENT_APP_RAISED: Final[int] = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_UNAVAILABLE: Final[int] = ErrorCode.MESSAGE_UNAVAILABLE
NODE_UNAVAILABLE: Final[int] = ErrorCode.NODE_UNAVAILABLE
NO_REPLY: Final[int] = ErrorCode.REPLY_MESSAGE_UNAVAILABLE


def set_process_identity(run_id: int) -> None:
    """Set the process identity, as Flower's launcher does. Without it, `Message(…)` raises on the server side."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Set the id of *message*. In Flower the SuperLink does this; `Metadata` has no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def build_message(
    metadata: Metadata, *, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """Build a message from its metadata. The public constructor only makes new messages and replies."""
    return make_message(metadata=metadata, content=content, error=error)


def empty_run(run_id: int) -> Run:
    return Run.create_empty(run_id)


CHECK_REPLIES: Final = "_check_and_log_replies"
"""The method of FedAvg that refuses inconsistent replies."""
_STOCK_CHECK: Final = FedAvg._check_and_log_replies  # noqa: SLF001 - this module holds the private names


def checks_replies_as_flower(strategy: FedAvg) -> bool:
    """Return whether *strategy* has no check of replies of its own, which might read their arrays."""
    return type(strategy)._check_and_log_replies is _STOCK_CHECK  # noqa: SLF001


def check_replies(strategy: FedAvg, replies: list[Message], *, hidden: int = 0) -> list[Message]:
    """Log the failed *replies* to a training message as Flower does, and return the valid ones.

    *hidden* is the number of valid replies that another one stands for.
    """
    with _count_replies(hidden):
        valid, _ = strategy._check_and_log_replies(replies, is_train=True)  # noqa: SLF001
    return valid


@contextmanager
def _count_replies(hidden: int) -> Iterator[None]:
    """Let Flower's line with the numbers of replies count *hidden* more of them."""

    def correct(record: logging.LogRecord) -> bool:
        if record.msg == "%s: Received %s results and %s failures" and isinstance(record.args, tuple):
            name, results, failures = record.args
            assert isinstance(results, int)
            record.args = (name, results + hidden, failures)
        return True

    logger = logging.getLogger("flwr")
    if hidden:
        logger.addFilter(correct)
    try:
        yield
    finally:
        logger.removeFilter(correct)


class BorrowedArray(Array):
    """An `Array` with the bytes of a buffer that it does not own, such as a received blob.

    `array_view` returns it without a copy; `numpy` makes the one copy that Flower guarantees; `data` converts
    the buffer to `bytes` at the first access.
    """

    __qualname__ = Array.__qualname__  # Flower writes the class name into serialised data

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, buffer: memoryview) -> None:
        self.__dict__["_buffer"] = buffer
        self.__dict__["_view"] = None
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype)

    @property
    def buffer(self) -> memoryview:
        """The serialised array with its .npy header."""
        return cast("memoryview", self.__dict__["_buffer"])

    @property
    def data(self) -> bytes:
        if not isinstance(self.buffer.obj, bytes) or len(self.buffer.obj) != len(self.buffer):
            self.__dict__.update(_buffer=memoryview(bytes(self.buffer)), _view=None)
        return cast("bytes", self.buffer.obj)

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__.update(_buffer=memoryview(value), _view=None)

    @property
    def view(self) -> np.ndarray[Any, Any]:
        """The array as a view of the buffer. Raises BadArray."""
        view = self.__dict__["_view"]
        if view is None:
            view = self.__dict__["_view"] = npy.array_from_npy(self.buffer)
        return cast("np.ndarray[Any, Any]", view)

    def copy(self) -> "BorrowedArray":
        """Return another array of the same buffer."""
        copied = object.__new__(BorrowedArray)
        copied.__dict__.update(self.__dict__)
        return copied

    def numpy(self) -> np.ndarray[Any, Any]:
        if self.stype != NUMPY:
            return cast("np.ndarray[Any, Any]", super().numpy())
        return array_view(self).copy(order="K")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        fields = (self.dtype, self.shape, self.stype, self.buffer)
        return fields == (other.dtype, other.shape, other.stype, serialized_buffer(other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def __repr__(self) -> str:
        return f"BorrowedArray(dtype={self.dtype!r}, shape={self.shape!r}, {len(self.buffer)} bytes)"


class UnserializedArray(BorrowedArray):
    """An `Array` that copies a NumPy array, and makes its .npy bytes when they are read.

    Its arrays are in C order. Flower's own `Array` copies twice, and writes a header by a general way that takes longer
    than the copies of a small array.
    """

    __qualname__ = Array.__qualname__

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__dict__.update(
            dtype=_dtype_name(array.dtype),
            shape=array.shape,
            stype=NUMPY,
            _buffer=None,
            _view=array.copy(order="C"),
        )

    @property
    def buffer(self) -> memoryview:
        if self.__dict__["_buffer"] is None:
            self.__dict__["_buffer"] = npy.serialize(self.__dict__["_view"])
            self.__dict__["_view"] = None  # one copy is enough: a later view is one of the buffer
        return cast("memoryview", self.__dict__["_buffer"])


_dtype_name = lru_cache(maxsize=64)(str)


def make_array(array: np.ndarray[Any, Any]) -> Array:
    """Return *array* as an `Array`, with an own copy of the elements."""
    is_plain = type(array) is np.ndarray and array.dtype.kind in "biufc" and array.dtype.isnative
    if is_plain and (array.flags.c_contiguous or not array.flags.f_contiguous):
        return UnserializedArray(array)
    return Array.from_numpy_ndarray(array)


def from_torch_state_dict(
    cls: type[ArrayRecord],
    state_dict: dict[str, Any],
    *,
    keep_input: bool = True,
) -> ArrayRecord:
    """Replace `ArrayRecord.from_torch_state_dict` by one that makes the arrays with `make_array`.

    Raises:
        RuntimeError: torch is not imported.
        TypeError: A key is not a string.

    """
    if "torch" not in sys.modules:
        raise RuntimeError(f"PyTorch is required to use {cls.from_torch_state_dict.__name__}")
    record = ArrayRecord()
    for key in list(state_dict.keys()):
        tensor = state_dict[key] if keep_input else state_dict.pop(key)
        record[key] = make_array(tensor.detach().cpu().numpy())
    return record


def _fast_view(kind: type[Any], stock: property) -> property:
    """Return a property of `RecordDict` with its records of one *kind*. Flower's own checks and copies each of them.

    The view of a subclass is Flower's *stock* one, because it reads and writes by methods that the class may override.
    """

    def view(self: RecordDict) -> Any:
        if type(self) is not RecordDict:
            return stock.__get__(self)
        synced = _SyncedDict(self, kind)
        synced.__dict__["_data"] = {name: record for name, record in self.items() if isinstance(record, kind)}
        return synced

    return property(view)


_VIEWS: Final = {"array_records": ArrayRecord, "metric_records": MetricRecord, "config_records": ConfigRecord}
_FAST_VIEWS: Final = {name: _fast_view(kind, getattr(RecordDict, name)) for name, kind in _VIEWS.items()}
"""Made before any of them is installed, from Flower's own."""


def install_fast_records() -> None:
    """Let records be cheap in this process: their views by kind, and the arrays of torch state dicts."""
    for name, view in _FAST_VIEWS.items():
        setattr(RecordDict, name, view)
    ArrayRecord.from_torch_state_dict = classmethod(from_torch_state_dict)  # type: ignore[assignment, method-assign]


def array_view(array: Array) -> np.ndarray[Any, Any]:
    """Return *array* as a NumPy view without a copy. Do not write to it.

    Raises:
        BadArray: the serialization type is not "numpy.ndarray", or the bytes are invalid.

    """
    if array.stype != NUMPY:
        raise npy.BadArray(f"serialization type {array.stype!r} is not supported (supported: {NUMPY!r})")
    return array.view if isinstance(array, BorrowedArray) else npy.array_from_npy(memoryview(array.data))


def serialized_buffer(array: Array) -> memoryview:
    """Return the serialised bytes of *array* without a copy."""
    return array.buffer if isinstance(array, BorrowedArray) else memoryview(array.data)
