"""Graceful shutdown: the one place that handles signals.

with stop_on_signals() as stop:
    await wait_for_first(work(), stop.wait())
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """Yield an event that SIGINT or SIGTERM sets while the block runs. The second signal ends this process at once.

    Child processes end with it: see `fedbus.agents.common.child_process`.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        if number is signal.SIGINT:
            print("stopping; press Ctrl-C again to end at once", file=sys.stderr)
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
