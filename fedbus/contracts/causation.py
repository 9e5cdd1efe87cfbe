"""The cause of a message: ``ce-causationid`` holds the id of the message whose handling published it.

Follow the header from message to message to find the root cause. The id is a context variable, so tasks and
threads that start during the handling inherit it. Requests are not stored; a message that a request caused
therefore names the cause of the request. A transition at a deadline, outside any handling, names the previous
transition of its entity, which set the deadline.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CURRENT_CAUSE: ContextVar[str] = ContextVar("fedbus_handled", default="")


def current_cause() -> str:
    """Return the id of the message that is being handled; empty if there is none."""
    return _CURRENT_CAUSE.get()


def set_current_cause(id: str) -> None:
    """Make message *id* the cause of all further messages of this task or thread."""
    _CURRENT_CAUSE.set(id)


@contextmanager
def cause_scope(id: str) -> Iterator[None]:
    """Make message *id* the cause of the messages that are published inside the block."""
    token = _CURRENT_CAUSE.set(id)
    try:
        yield
    finally:
        _CURRENT_CAUSE.reset(token)
