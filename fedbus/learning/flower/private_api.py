"""The private touches that flwr 1.41 leaves no way around; nothing else in fedbus reaches behind Flower's back.

Each stands here with its reason. `tests/learning/flower/test_private_api.py` fails when Flower
changes one of them: then this module changes, and nothing else.

    identify_process     `Message(content, dst_node_id, message_type)` on the server side reads a process-wide identity
    stamp                the metadata of a message that the Grid sends has no setter for its id
    message_of           a message that came over a wire is made from metadata, which is not public
    empty_run            legacy `server_fn` apps ask the Grid for a `Run`, which has no public constructor
    LentArray            an `Array` insists on owning `bytes`; this one lends them from a buffer it does not own
    RunNotRunningException  by it Flower's background threads know that a Grid is gone, and end
    error codes, log, the default aggregation functions: public in name nowhere
"""

from typing import Any, Final, cast

import numpy as np
from flwr.app import Array, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from fedbus.learning import npy

__all__ = [
    "CLIENT_APP_RAISED",
    "LOAD_CLIENT_APP_FAILED",
    "MAIN_PARAMS_RECORD",
    "MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
    "NO_REPLY",
    "NUMPY",
    "SERVER_NODE_ID",
    "UNKNOWN_ERROR",
    "BorrowedArray",
    "Run",
    "RunNotRunningException",
    "aggregate_metricrecords",
    "array_view",
    "build_message",
    "empty_run",
    "serialized_buffer",
    "set_message_id",
    "set_process_identity",
]

SERVER_NODE_ID: Final[int] = SUPERLINK_NODE_ID
NUMPY: Final[str] = SType.NUMPY

UNKNOWN_ERROR: Final[int] = ErrorCode.UNKNOWN
LOAD_CLIENT_APP_FAILED: Final[int] = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
CLIENT_APP_RAISED: Final[int] = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_UNAVAILABLE: Final[int] = ErrorCode.MESSAGE_UNAVAILABLE
NODE_UNAVAILABLE: Final[int] = ErrorCode.NODE_UNAVAILABLE
NO_REPLY: Final[int] = ErrorCode.REPLY_MESSAGE_UNAVAILABLE


def set_process_identity(run_id: int) -> None:
    """Say who this process is, as Flower's own launcher does: without it `Message(…)` raises on the server side."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Give *message* its id: in Flower the SuperLink does, and `Metadata` has no setter for it."""
    message.metadata.__dict__["_message_id"] = message_id


def build_message(
    metadata: Metadata, *, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """The message with this metadata: the public constructor knows only new messages and replies to them."""
    return make_message(metadata=metadata, content=content, error=error)


def empty_run(run_id: int) -> Run:
    return Run.create_empty(run_id)


class BorrowedArray(Array):
    """An `Array` whose bytes lie in a buffer that somebody else allocated, such as a blob as it came in.

    `view` is the array itself, without a copy; `numpy` makes the one copy that Flower promises;
    `data` becomes `bytes` when stock code asks for it.
    """

    __qualname__ = Array.__qualname__  # Flower writes it into what it serialises

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, buffer: memoryview) -> None:
        self.__dict__["_buffer"] = buffer
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype)

    @property
    def buffer(self) -> memoryview:
        """The serialised array, .npy header included."""
        return cast("memoryview", self.__dict__["_buffer"])

    @property
    def data(self) -> bytes:
        if not isinstance(self.buffer.obj, bytes) or len(self.buffer.obj) != len(self.buffer):
            self.__dict__["_buffer"] = memoryview(bytes(self.buffer))
        return cast("bytes", self.buffer.obj)

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_buffer"] = memoryview(value)

    def numpy(self) -> np.ndarray[Any, Any]:
        if self.stype != NUMPY:
            return cast("np.ndarray[Any, Any]", super().numpy())
        return array_view(self).copy(order="K")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, self.shape, self.stype, self.buffer)
        return mine == (other.dtype, other.shape, other.stype, serialized_buffer(other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def __repr__(self) -> str:
        return f"LentArray(dtype={self.dtype!r}, shape={self.shape!r}, {len(self.buffer)} bytes)"


def array_view(array: Array) -> np.ndarray[Any, Any]:
    """The numbers in *array* without a copy; raises npy.BadArray. Do not write into it."""
    if array.stype != NUMPY:
        raise npy.BadArray(f"its serialization is {array.stype!r}, and only {NUMPY!r} is understood")
    return npy.array_from_npy(serialized_buffer(array))


def serialized_buffer(array: Array) -> memoryview:
    """The bytes of *array* where they lie."""
    return array.buffer if isinstance(array, BorrowedArray) else memoryview(array.data)
