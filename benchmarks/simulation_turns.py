"""Turns: a process of the benchmark runs a round when its driver asks for one, and reports its seconds.

The driver writes a line to the standard input of the process, which answers with a line
``seconds CPU-seconds MiB-of-memory``.
"""

import os
import sys
import time

import psutil

from fedbus.simulation.memory import memory_of

_started: tuple[float, float] | None = None
_output = os.fdopen(os.dup(1), "w")
"""The answers; what the app prints goes elsewhere."""


def wait_for_turn() -> None:
    """Report the round that has ended, if one was asked for, and block until the next one may begin."""
    global _started  # noqa: PLW0603 - one process runs one side
    if _started is not None:
        seconds, cpu_s = time.perf_counter() - _started[0], cpu_seconds() - _started[1]
        print(f"{seconds:.6f} {cpu_s:.3f} {memory_mib():.1f}", file=_output, flush=True)
    else:
        print("ready", file=_output, flush=True)
    if not sys.stdin.readline():
        os._exit(0)
    _started = time.perf_counter(), cpu_seconds()


def memory_mib() -> float:
    """Return the memory of this process and the processes that it has started; what they share counts once."""
    me = psutil.Process()
    return sum(memory_of(process.pid) for process in [me, *me.children(recursive=True)]) / 1024**2


def cpu_seconds() -> float:
    """Return the CPU time of this process and the processes that it has started."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
