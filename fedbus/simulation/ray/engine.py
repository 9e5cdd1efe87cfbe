"""The engine `ray`: one actor a core of a Ray cluster, and payloads in its object store.

Each worker has a thread here that waits for its results and puts them into one queue, where `wait` takes them. An actor
that ends, or whose machine ends, is replaced by one with the same number. The replacement asks for no core: the cluster
may have fewer than before, and an actor that waits for a core would hold up its clients' messages for ever.
"""

import math
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.learning.library import BadTask
from fedbus.learning.payload import Payload
from fedbus.simulation.engine import (
    EngineFailed,
    Event,
    MessageBatch,
    Order,
    ReleasePayload,
    Replies,
    SumTaken,
    WorkerJob,
    WorkerLost,
    WorkerStarted,
)
from fedbus.simulation.gpus import VISIBLE_DEVICES
from fedbus.simulation.ray.task_archive import pack_task
from fedbus.simulation.ray.worker_actor import ActorStarted, WorkerActor, unpack_buffers
from fedbus.simulation.settings import BadSettings
from fedbus.simulation.worker_setup import ENVIRONMENT

RAY_EXTRA: Final = "pip install 'fedbus[ray]'"
OWN_CLUSTER: Final = "local"
"""The address with which Ray starts a cluster."""
START_S: Final = 180.0
"""The time in which a worker has to start and import the app."""
CLOSE_S: Final = 5.0
"""The time that workers have to close their sessions."""
JOIN_S: Final = 5.0
CONNECT_S: Final = 5.0
MAX_FAILED_STARTS: Final = 5
INLINE_BYTES: Final = 16 * 1024
"""The size up to which a payload is a part of the call, and not an object."""
MIN_LOSSES_IN_A_ROW: Final = 10
"""At least so many workers may end one after the other without an event between them; and twice the workers."""
PASSED_VARIABLES: Final = ("FEDBUS_HOME", "FEDBUS_DATA_DIR", "PYTHONPATH")
"""Variables of this process that the workers get, too."""
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

Ray: TypeAlias = Any
"""The module, or a handle of it: Ray has no types for its calls."""


@dataclass(eq=False)
class _ActorLink:
    """The engine's side of one worker."""

    number: int
    actor: Ray
    starts_until: float
    """The time by which it must have started."""
    streams: "queue.SimpleQueue[Ray]" = field(default_factory=queue.SimpleQueue)
    """The results of its orders, in order; None ends its thread."""
    thread: threading.Thread | None = None
    started: ActorStarted | None = None
    waiting: list[tuple[Order, Ray]] = field(default_factory=list)
    """Orders with their data, until it has started."""
    failed_starts: int = 0
    is_killed: bool = False

    def __str__(self) -> str:
        if self.started is None:
            return f"worker {self.number}"
        return f"worker {self.number} (process {self.started.pid} on {self.started.host})"


_Report: TypeAlias = tuple[_ActorLink, ActorStarted | Event | Exception]


class RayEngine:
    """Workers in the Ray cluster at *address*, by default RAY_ADDRESS, else in one of their own on this machine.

    *workers* None: one for each core of the cluster, but no more than clients. *gpus* is the number of GPUs that the
    workers share. *is_quiet*: the output of the workers stays in Ray's logs.
    """

    def __init__(
        self,
        job: WorkerJob,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus: int = 0,
        is_quiet: bool = False,
    ) -> None:
        self._job = job
        self._address = address or os.environ.get("RAY_ADDRESS") or OWN_CLUSTER
        self._requested_workers = workers
        self._gpus = gpus
        self._is_quiet = is_quiet
        self._ray: Ray = None
        self._is_connected_here = False
        self._actor_class: Ray = None
        self._gpu_share = 0.0
        self._job_object: Ray = None
        self._archive_object: Ray = None
        self._links: list[_ActorLink] = []
        self._payloads: dict[int, Ray] = {}
        self._next_payload = 0
        self._reports: queue.SimpleQueue[_Report | None] = queue.SimpleQueue()
        self._losses_in_a_row = 0

    @property
    def workers(self) -> int:
        return len(self._links)

    # --- start --------------------------------------------------------------------------------

    def start(self) -> None:
        archive = pack_task(self._job.task)
        self._ray = _import_ray()
        self._connect()
        resources = self._ray.cluster_resources()
        count = self._choose_workers(resources)
        self._actor_class = self._ray.remote(WorkerActor)
        self._job_object, self._archive_object = self._ray.put(self._job), self._ray.put(archive)
        gpu_share = min(1.0, self._gpus / count) if self._gpus else 0.0
        if gpu_share * count > resources.get("GPU", 0):
            raise EngineFailed(
                f"the workers need {self._gpus} GPUs, and the Ray cluster has {resources.get('GPU', 0):g}. "
                "Use fewer: --gpus"
            )
        self._gpu_share = gpu_share
        self._links = [self._start_worker(number, cores=1) for number in range(count)]

    def _connect(self) -> None:
        """Connect this process to the cluster, unless it is connected already."""
        ray = self._ray
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": not self._is_quiet}
        if self._address == OWN_CLUSTER:
            options |= {"num_cpus": self._requested_workers, "include_dashboard": False}
        try:
            _check_reachable(self._address)
            with _signal_handlers_kept(), _environment(_QUIET):
                ray.init(self._address, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if self._address == OWN_CLUSTER:
                raise EngineFailed(f"cannot start a Ray cluster: {_first_line(error)}") from None
            raise EngineFailed(
                f"cannot connect to the Ray cluster {self._address}: {_first_line(error)}. "
                "Check its address with: ray status --address ADDRESS"
            ) from None
        self._is_connected_here = True

    def _choose_workers(self, resources: Mapping[str, float]) -> int:
        cores = int(resources.get("CPU", 0))
        wanted = self._requested_workers or max(1, min(cores, self._job.clients))
        if wanted > cores:
            raise EngineFailed(
                f"{wanted} workers need a core each, and the Ray cluster has {cores}. Use --workers"
            )
        return wanted

    def _start_worker(self, number: int, *, cores: int) -> _ActorLink:
        options: dict[str, Any] = {
            "num_cpus": cores,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": self._worker_environment()},
        }
        if self._gpu_share:
            options["num_gpus"] = self._gpu_share
        actor = self._actor_class.options(**options).remote(number, self._job_object, self._archive_object)
        link = _ActorLink(number, actor, time.monotonic() + START_S)
        link.thread = threading.Thread(
            target=self._receive, args=(link, actor.start.remote()), name=f"ray worker {number}", daemon=True
        )
        link.thread.start()
        return link

    def _worker_environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        if "FEDBUS_HOME" in passed:
            passed["FEDBUS_HOME"] = os.path.abspath(passed["FEDBUS_HOME"])  # noqa: PTH100 - no `~` in it
        hidden = {} if self._gpu_share else {VISIBLE_DEVICES: ""}
        return {**ENVIRONMENT, **_QUIET, **passed, **hidden}

    # --- payloads and orders ------------------------------------------------------------------

    def place(self, payload: Payload) -> int:
        self._next_payload += 1
        self._payloads[self._next_payload] = self._store(payload)
        return self._next_payload

    def _store(self, payload: Payload) -> Ray:
        """Return the payload as an object of the cluster, or as bytes if it is small."""
        if payload.size_bytes <= INLINE_BYTES:
            return payload.to_bytes()
        if len(payload.buffers) == 1:
            content = np.frombuffer(payload.buffers[0], np.uint8)
        else:
            content = np.empty(payload.size_bytes, np.uint8)
            position = 0
            for buffer in payload.buffers:
                content[position : position + len(buffer)] = np.frombuffer(buffer, np.uint8)
                position += len(buffer)
        try:
            return self._ray.put(content)
        except (self._ray.exceptions.ObjectStoreFullError, self._ray.exceptions.OutOfDiskError):
            raise EngineFailed(
                f"no space for a message of {payload.size_bytes / 1024**2:,.1f} MiB in Ray's object store. "
                "Free memory, or start Ray with a larger one: ray start --object-store-memory"
            ) from None

    def release(self, payload: int) -> None:
        del self._payloads[payload]
        for link in self._links:
            self._call(link, ReleasePayload(payload), b"")

    def submit(self, worker: int, order: Order) -> None:
        data = self._payloads[order.payload] if isinstance(order, MessageBatch) else b""
        self._call(self._links[worker], order, data)

    def _call(self, link: _ActorLink, order: Order, data: Ray) -> None:
        if link.started is None:
            link.waiting.append((order, data))
            return
        with suppress(self._ray.exceptions.RayActorError):  # its thread reports the end of the actor
            link.streams.put(link.actor.handle.options(num_returns="streaming").remote(order, data))

    # --- events -------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None) -> list[Event]:
        now = time.monotonic()
        until = min((link.starts_until for link in self._links if link.started is None), default=math.inf)
        limit_s = min(math.inf if timeout_s is None else timeout_s, max(0.0, until - now))
        try:
            reports = [self._reports.get(timeout=None if math.isinf(limit_s) else limit_s)]
        except queue.Empty:
            if time.monotonic() >= until:
                raise EngineFailed(self._describe_slow_start()) from None
            return []
        with suppress(queue.Empty):
            while True:
                reports.append(self._reports.get_nowait())
        return [event for report in reports if report is not None for event in self._handle(*report)]

    def _handle(self, link: _ActorLink, report: ActorStarted | Event | Exception) -> Iterator[Event]:
        if self._links[link.number] is not link:  # it was replaced
            return
        match report:
            case ActorStarted():
                if report.problem:
                    raise BadTask(report.problem)
                link.started = report
                for order, data in link.waiting:
                    self._call(link, order, data)
                link.waiting.clear()
                yield WorkerStarted(link.number)
            case Exception() if link.started is None and not link.is_killed:
                self._start_again(link, report)
            case Exception():
                yield self._replace_worker(link, report)
            case Replies() | SumTaken():
                self._losses_in_a_row = 0
                yield replace(report, buffers=unpack_buffers(report.buffers))
            case _:
                yield report

    def _start_again(self, link: _ActorLink, error: Exception) -> None:
        """Replace a worker that has ended before it started, for example on a machine that was just lost."""
        failed_starts = link.failed_starts + 1
        if failed_starts > MAX_FAILED_STARTS or time.monotonic() > link.starts_until:
            raise EngineFailed(
                f"{link} {describe_end(error, is_killed=False)} before it was started "
                f"(limit {MAX_FAILED_STARTS} times). "
                "Each machine of the cluster needs the same fedbus and the task's packages"
            )
        self._kill(link)
        again = self._links[link.number] = self._start_worker(link.number, cores=0)
        again.waiting, again.starts_until, again.failed_starts = (
            link.waiting,
            link.starts_until,
            failed_starts,
        )

    def _replace_worker(self, link: _ActorLink, error: Exception) -> WorkerLost:
        reason = f"{link} {describe_end(error, is_killed=link.is_killed)}"
        self._losses_in_a_row += 1
        limit = max(MIN_LOSSES_IN_A_ROW, 2 * self.workers)
        if self._losses_in_a_row > limit:
            raise EngineFailed(
                f"{self._losses_in_a_row} workers ended one after the other without a reply (limit {limit}). "
                f"The last: {reason}"
            )
        self._kill(link)  # it may only be unreachable
        self._links[link.number] = self._start_worker(link.number, cores=0)
        return WorkerLost(link.number, reason)

    def _receive(self, link: _ActorLink, start: Ray) -> None:
        """Put the results of the worker into the queue, until it ends. Runs in the worker's thread."""
        try:
            self._reports.put((link, self._ray.get(start)))
            while (stream := link.streams.get()) is not None:
                for reference in stream:
                    self._reports.put((link, self._ray.get(reference)))
        except Exception as error:  # noqa: BLE001 - `wait` handles it
            self._reports.put((link, error))

    def _describe_slow_start(self) -> str:
        late = [link.number for link in self._links if link.started is None]
        free = self._ray.available_resources().get("CPU", 0)
        return (
            f"{len(late)} of {self.workers} workers have not started within {START_S:g} s. The Ray cluster has "
            f"{free:g} free cores now. Wait until its other jobs end, or use fewer workers: --workers"
        )

    def kill(self, worker: int) -> None:
        link = self._links[worker]
        link.is_killed = True
        self._kill(link)

    def _kill(self, link: _ActorLink) -> None:
        with suppress(Exception):  # it may have ended, and with it its machine
            self._ray.kill(link.actor)

    def wake(self) -> None:
        self._reports.put(None)

    def processes(self) -> list[int]:
        here = socket.gethostname()
        return [
            one.started.pid for one in self._links if one.started is not None and one.started.host == here
        ]

    # --- end ----------------------------------------------------------------------------------

    def close(self, *, at_once: bool = False) -> None:
        if self._ray is None or not self._ray.is_initialized():
            return
        if not at_once and self._links:
            with suppress(self._ray.exceptions.RayError):
                closed = [link.actor.close.remote() for link in self._links if link.started is not None]
                self._ray.wait(closed, num_returns=len(closed), timeout=CLOSE_S)
        for link in self._links:
            link.streams.put(None)
            self._kill(link)
        for link in self._links:
            if link.thread is not None:
                link.thread.join(JOIN_S)
        self._links, self._payloads = [], {}
        self._job_object = self._archive_object = None
        if self._is_connected_here:
            with _signal_handlers_kept():
                self._ray.shutdown()


def describe_end(error: Exception, *, is_killed: bool) -> str:
    """Describe in a part of a sentence how an actor has ended."""
    text = " ".join(str(error).split())
    if is_killed:
        return "was ended, because it did not answer in time"
    if "node has died" in text or "node was terminated" in text or "NODE_DIED" in text:
        return "has ended, because its machine left the cluster"
    if "memory" in text.lower() and ("OOM" in text or "out of memory" in text.lower()):
        return (
            "has ended, probably because its machine had no memory left: "
            "use fewer workers, fewer clients, or less data for each client"
        )
    return f"has ended: {text[:300]}"


def _import_ray() -> Ray:
    try:
        with _environment(_QUIET):
            import ray  # noqa: PLC0415 - an optional package
    except ImportError:
        raise BadSettings(f"the engine ray needs the package ray. Install it: {RAY_EXTRA}") from None
    return ray


def _check_reachable(address: str) -> None:
    """Connect once to *address* if it is host and port: Ray itself tries for minutes. Raises OSError."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those of *variables* that are not set, while the block runs."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers of this process, which Ray replaces."""
    signals = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
