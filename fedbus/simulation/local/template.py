"""The template of the workers: imports the app once, and forks a worker whenever the engine asks for one.

It has one thread and does nothing else, so a fork is safe at any time, also when a worker is replaced in the middle of
a run. It ends when the engine closes its socket or dies, and takes the workers with it.
"""

import ctypes
import gc
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fedbus.simulation.engine import WorkerJob
from fedbus.simulation.local import frames, worker_process
from fedbus.simulation.local.frames import FrameReader, PeerClosed
from fedbus.simulation.worker_setup import ENVIRONMENT, import_app

OUT_OF_MEMORY_SCORE: Final = "500"
"""Added to the score of a worker, so that the kernel ends a worker first when memory is short."""
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class ForkWorker:
    """Asks for worker *number*. Its socket comes as a file descriptor."""

    number: int
    environment: dict[str, str]


@dataclass(frozen=True)
class AppImported:
    """The app is imported, or *problem* is why not."""

    problem: str = ""


@dataclass(frozen=True)
class WorkerForked:
    number: int
    pid: int


@dataclass(frozen=True)
class WorkerExited:
    number: int
    pid: int
    exit_code: int
    """Negative: the signal that ended it."""


def main(descriptor: int) -> None:
    """Import the app, and fork workers until the engine closes the socket."""
    sock = socket.socket(fileno=descriptor)
    reader = FrameReader(sock)
    try:
        frame = reader.read()
    except PeerClosed:
        return
    assert frame is not None, "the socket blocks"
    job: WorkerJob = frame[0]
    problem = import_app(job.task) or find_cuda_problem()
    try:
        frames.send(sock, frames.dump(AppImported(problem)))
        if not problem:
            _Template(sock, reader, job).serve()
    except PeerClosed:
        pass


def find_cuda_problem() -> str:
    """Return why workers cannot be forked after the import of the app, or an empty text."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return (
            "the import of the task initialised CUDA, which does not work in forked workers. "
            "Create models and tensors on a GPU in the functions of the task, not when its modules are imported"
        )
    return ""


class _Template:
    """Forks workers, and reports those that end."""

    def __init__(self, sock: socket.socket, reader: FrameReader, job: WorkerJob) -> None:
        self._sock = sock
        self._reader = reader
        self._job = job
        self._workers: dict[int, int] = {}
        """The number of each living worker, by its process id."""

    def serve(self) -> None:
        gc.freeze()  # the pages of imported modules stay shared: the collector of a worker does not write to them
        awake, wake = os.pipe()
        for end in (awake, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._sock.settimeout(0)
        try:
            while True:
                select.select([self._sock.fileno(), awake], [], [])
                with suppress(BlockingIOError):
                    os.read(awake, 4096)
                self._reap()
                while (frame := self._reader.read()) is not None:
                    self._fork(frame[0])
        finally:
            for pid in self._workers:
                kill_group(pid)

    def _fork(self, order: ForkWorker) -> None:
        descriptor = self._reader.descriptors.pop(0)
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(order, descriptor)
            finally:
                os._exit(70)  # only if the worker raised
        os.close(descriptor)
        self._workers[pid] = order.number
        self._send(WorkerForked(order.number, pid))

    def _become_worker(self, order: ForkWorker, descriptor: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._sock.close()
        os.setpgid(0, 0)
        end_with_parent()
        os.environ.update(order.environment)
        worker_process.run(socket.socket(fileno=descriptor), order.number, self._job)

    def _reap(self) -> None:
        while self._workers:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self._workers:
                kill_group(pid)  # what the app has started
                self._send(WorkerExited(self._workers.pop(pid), pid, os.waitstatus_to_exitcode(status)))

    def _send(self, value: object) -> None:
        self._sock.settimeout(None)
        try:
            frames.send(self._sock, frames.dump(value))
        finally:
            self._sock.settimeout(0)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent dies (Linux), and before other processes if memory is short."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(OUT_OF_MEMORY_SCORE)


def kill_group(pid: int) -> None:
    """Kill the process group that *pid* leads."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def environment(base: dict[str, str]) -> dict[str, str]:
    """Return the environment of the template: that of a worker, unless *base* sets it."""
    return {**ENVIRONMENT, **base}
