"""What led to a message: the id of the one that was being handled when it was said, in the header ``ce-causationid``.

So from any message one leads back, message by message, to what began it all. The message at hand is known to whatever
is done on its account, tasks and threads that are begun meanwhile included; a request is kept nowhere, so what it
leads to names what led to the request. Where nothing is being handled, a lifecycle that leaves a state in which it
waited names its own last transition, since that is where it has set the clock by which it now moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CURRENT_CAUSE: ContextVar[str] = ContextVar("fedbus_handled", default="")


def current_cause() -> str:
    """The id of the message that is being handled here; nothing where none is."""
    return _CURRENT_CAUSE.get()


def set_current_cause(id: str) -> None:
    """From here on this task or thread works on account of message *id*."""
    _CURRENT_CAUSE.set(id)


@contextmanager
def cause_scope(id: str) -> Iterator[None]:
    """What is done inside is done on account of message *id*."""
    token = _CURRENT_CAUSE.set(id)
    try:
        yield
    finally:
        _CURRENT_CAUSE.reset(token)
