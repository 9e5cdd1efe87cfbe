"""Being asked to stop: the one place that handles signals.

    with stopping() as stop:
        await first_of(work(), stop.wait())

Running our own child processes is in `fedbus.agents.common.child_process`, because agents need it too.
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
    """An event that SIGINT or SIGTERM sets, for as long as the block runs. The second signal ends us at once.

    Children need no care then: they end with us, see `fedbus.agents.common.child_process`.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def asked(how: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + how)
        if how is signal.SIGINT:
            print("stopping; press Ctrl-C again to end at once", file=sys.stderr)
        stop.set()

    for how in STOP_SIGNALS:
        loop.add_signal_handler(how, asked, how)
    try:
        yield stop
    finally:
        for how in STOP_SIGNALS:
            loop.remove_signal_handler(how)
