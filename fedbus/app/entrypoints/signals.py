"""Graceful shutdown: the one place that handles signals.

An agent's event loop runs in the main thread:

    with stop_on_signals() as stop:
        await wait_for_first(work(), stop.wait())

In a process that runs the code of a task, the main thread belongs to that code, and the event loop runs in another
thread: `SignalWatch()` in the main thread, `SignalWatch.stop_event` on the event loop.
"""

import asyncio
import os
import signal
import socket
import sys
import threading
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
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, _on_signal, number, stop)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


class SignalWatch:
    """Passes SIGINT and SIGTERM from the main thread to an event loop in another thread.

    Python runs a signal handler in the main thread only, and only between two of its instructions. So the signals
    also arrive on a socket (`signal.set_wakeup_fd`), which the loop reads: code of the task
    that blocks the main thread, or replaces the handler, does not delay them.
    """

    def __init__(self) -> None:
        """Install the handlers. Called in the main thread."""
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)  # noqa: FBT003 - the only parameter
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_python_signal)
        self._fork = threading.local()
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._forget_in_child
        )

    @contextmanager
    def stop_event(self) -> Iterator[asyncio.Event]:
        """Yield an event of the running loop that one of the signals sets. The second ends this process at once."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._reader, self._on_readable, stop)
        try:
            yield stop
        finally:
            loop.remove_reader(self._reader)

    def _on_readable(self, stop: asyncio.Event) -> None:
        for byte in self._reader.recv(64):
            if byte in set(STOP_SIGNALS):
                _on_signal(signal.Signals(byte), stop)

    def _on_python_signal(self, number: int, _: object) -> None:
        """Pass on the signal if code of the task, such as its own event loop, has taken the wake-up socket."""
        descriptor = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        if descriptor != self._writer.fileno():
            self._writer.send(bytes([number]))

    def _block(self) -> None:
        """Delay the signals while a process forks: its child would pass them on to this process."""
        self._fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._fork.mask)

    def _forget_in_child(self) -> None:
        """Restore the defaults in a forked process, such as a data loader, whose signals are its own."""
        descriptor = signal.set_wakeup_fd(-1)
        if descriptor != self._writer.fileno():
            signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._on_python_signal:
                signal.signal(number, signal.SIG_DFL)
        self._unblock()


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)
    if number is signal.SIGINT:
        print("stopping; press Ctrl-C again to end at once", file=sys.stderr)
    stop.set()
