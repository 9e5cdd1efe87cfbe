"""Propagate cancellations that nats-py loses.

nats-py 2.16 uses ``asyncio.wait_for``, which up to Python 3.11 loses a cancellation if its future completes at the
same moment (python/cpython#86296); it also swallows a cancellation while it waits for its flusher. The cancelled
task would continue, and the task that awaits its end would wait for ever.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription


@contextmanager
def propagate_cancellation() -> Iterator[None]:
    """Raise CancelledError at the end of the block if the current task was cancelled inside and the error was lost.

    It replaces another error of the block, such as that of a refusal that arrived at the moment of the cancellation.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    except Exception as error:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


async def next_message(subscription: Subscription, within_s: float) -> Msg:
    """Return the next message of *subscription*; raises nats.errors.TimeoutError after *within_s*."""
    with propagate_cancellation():
        return await subscription.next_msg(timeout=within_s)
