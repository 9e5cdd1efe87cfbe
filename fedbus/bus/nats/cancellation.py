"""A task that was asked to end, ends: what nats-py loses of cancellations is not lost here.

nats-py 2.16 waits by ``asyncio.wait_for``, which up to Python 3.11 forgets that it was cancelled when what it
waits for comes in the same moment (python/cpython#86296), and it swallows a cancellation while it waits for its
flusher. The task would go on, and whoever waits for its end would wait for ever.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription


@contextmanager
def propagate_cancellation() -> Iterator[None]:
    """Raises CancelledError at the end of a block in which the current task was cancelled, if nothing else did."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


async def next_message(subscription: Subscription, within_s: float) -> Msg:
    """The next message of *subscription*; raises nats.errors.TimeoutError where none comes."""
    with propagate_cancellation():
        return await subscription.next_msg(timeout=within_s)
