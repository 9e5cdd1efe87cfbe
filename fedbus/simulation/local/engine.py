"""The engine `local`: starts the template and its workers, and exchanges frames with them. Nothing polls."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.learning.library import BadTask
from fedbus.learning.payload import Payload
from fedbus.simulation.engine import (
    EngineFailed,
    Event,
    Order,
    ReleasePayload,
    Replies,
    SumTaken,
    WorkerJob,
    WorkerLost,
)
from fedbus.simulation.local import frames, template
from fedbus.simulation.local.frames import FrameReader, PeerClosed
from fedbus.simulation.local.shared_memory import write_shared
from fedbus.simulation.local.template import (
    AppImported,
    ForkWorker,
    WorkerExited,
    WorkerForked,
    environment,
    kill_group,
)
from fedbus.simulation.local.worker_process import CloseWorker, PlacePayload

TEMPLATE_PROGRAM: Final = f"import sys; from {template.__name__} import main; main(int(sys.argv[1]))"
CLOSE_S: Final = 5.0
"""The time that workers have to close their sessions."""
MAX_LOSSES_IN_A_ROW: Final = 10
"""Workers that die one after the other without a reply between them, after which the simulation ends."""


@dataclass
class _Outgoing:
    """Bytes for a worker, and the file descriptors that go with the first of them."""

    data: memoryview
    descriptors: tuple[int, ...] = ()


@dataclass
class _WorkerLink:
    """The engine's side of one worker."""

    number: int
    sock: socket.socket
    reader: FrameReader
    outgoing: deque[_Outgoing] = field(default_factory=deque)
    pid: int = 0
    is_writing: bool = False
    has_ended: bool = False
    """Its socket is closed; the reason comes from the template."""


@contextmanager
def _open_log(path: Path | None) -> Iterator[BinaryIO | None]:
    """Open the file for the output of the workers; None: they share that of this process."""
    if path is None:
        yield None
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise EngineFailed(f"cannot write the log of the workers, {path}: {error.strerror}") from None
    with file:
        yield file


@dataclass(frozen=True)
class _StoredPayload:
    descriptor: int | None
    data: bytes | None


class LocalEngine:
    """Worker processes on this machine. *environments* has additional variables of each worker, such as its GPUs."""

    def __init__(
        self,
        job: WorkerJob,
        *,
        workers: int,
        environments: Sequence[Mapping[str, str]] = (),
        log_file: Path | None = None,
    ) -> None:
        self._job = job
        self._log_file = log_file
        self._environments = environments or [{}] * workers
        self._links: list[_WorkerLink | None] = [None] * workers
        self._payloads: dict[int, _StoredPayload] = {}
        self._next_payload = 0
        self._selector = selectors.DefaultSelector()
        self._awake, self._wake = os.pipe()
        for descriptor in (self._awake, self._wake):
            os.set_blocking(descriptor, False)
        self._selector.register(self._awake, selectors.EVENT_READ, None)
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._control_reader: FrameReader | None = None
        self._has_imported = False
        self._losses_in_a_row = 0

    @property
    def workers(self) -> int:
        return len(self._links)

    # --- start --------------------------------------------------------------------------------

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, _open_log(self._log_file) as output:
            self._template = subprocess.Popen(
                [sys.executable, "-c", TEMPLATE_PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment(dict(os.environ)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C ends this process, which ends the workers
            )
        self._control, self._control_reader = ours, FrameReader(ours)
        frames.send(ours, frames.dump(self._job))
        ours.settimeout(0)
        self._selector.register(ours, selectors.EVENT_READ, "template")
        for number in range(self.workers):
            self._start_worker(number)

    def _start_worker(self, number: int) -> None:
        """Create the link of a worker. Its orders wait in the socket until the template has forked it."""
        assert self._control is not None
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        link = _WorkerLink(number, ours, FrameReader(ours))
        self._links[number] = link
        self._selector.register(ours, selectors.EVENT_READ, link)
        self._control.settimeout(None)
        try:
            (frame,) = frames.dump(ForkWorker(number, dict(self._environments[number])))
            socket.send_fds(self._control, [frame], [theirs.fileno()])
        except OSError as error:
            raise EngineFailed(f"the template of the workers has ended: {error}") from None
        finally:
            self._control.settimeout(0)
            theirs.close()
        for payload, placed in self._payloads.items():
            self._send_payload(link, payload, placed)

    # --- payloads and orders ------------------------------------------------------------------

    def place(self, payload: Payload) -> int:
        self._next_payload += 1
        if payload.size_bytes <= MAX_INLINE_BYTES:
            placed = _StoredPayload(None, payload.to_bytes())
        else:
            placed = _StoredPayload(write_shared(payload.buffers), None)
        self._payloads[self._next_payload] = placed
        for link in self._links:
            if link is not None:
                self._send_payload(link, self._next_payload, placed)
        return self._next_payload

    def release(self, payload: int) -> None:
        placed = self._payloads.pop(payload)
        for link in self._links:
            if link is not None:
                self._send(link, ReleasePayload(payload))
        if placed.descriptor is not None:
            os.close(placed.descriptor)

    def submit(self, worker: int, order: Order) -> None:
        link = self._links[worker]
        assert link is not None, "the engine is not started"
        self._send(link, order)

    def _send_payload(self, link: _WorkerLink, payload: int, placed: _StoredPayload) -> None:
        descriptors = () if placed.descriptor is None else (os.dup(placed.descriptor),)
        self._send(link, PlacePayload(payload, placed.data), descriptors)

    def _send(self, link: _WorkerLink, value: object, descriptors: tuple[int, ...] = ()) -> None:
        (frame,) = frames.dump(value)
        link.outgoing.append(_Outgoing(memoryview(frame), descriptors))
        self._flush(link)

    def _flush(self, link: _WorkerLink) -> None:
        """Send as much as the socket takes, and wait for it to take the rest."""
        while link.outgoing and not link.has_ended:
            entry = link.outgoing[0]
            try:
                if entry.descriptors:
                    sent = socket.send_fds(link.sock, [entry.data], list(entry.descriptors))
                    for descriptor in entry.descriptors:
                        os.close(descriptor)
                    entry.descriptors = ()
                else:
                    sent = link.sock.send(entry.data)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                break  # `wait` finds the end of the worker
            entry.data = entry.data[sent:]
            if not entry.data:
                link.outgoing.popleft()
        if bool(link.outgoing) != link.is_writing and not link.has_ended:
            link.is_writing = bool(link.outgoing)
            writing = selectors.EVENT_WRITE if link.is_writing else 0
            self._selector.modify(link.sock, selectors.EVENT_READ | writing, link)

    # --- events -------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None) -> list[Event]:
        events: list[Event] = []
        for key, mask in self._selector.select(timeout_s):
            link = key.data
            if link is None:
                with suppress(BlockingIOError):
                    os.read(self._awake, 4096)
            elif link == "template":
                events += self._read_template()
            else:
                if mask & selectors.EVENT_WRITE:
                    self._flush(link)
                if mask & selectors.EVENT_READ:
                    events += self._read_worker(link)
        return events

    def kill(self, worker: int) -> None:
        link = self._links[worker]
        if link is not None and link.pid and not link.has_ended:
            kill_group(link.pid)

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake, b"\0")

    def _read_worker(self, link: _WorkerLink) -> list[Event]:
        events: list[Event] = []
        try:
            while (frame := link.reader.read()) is not None:
                event, data = frame
                has_buffers = isinstance(event, Replies | SumTaken)
                events.append(replace(event, buffers=[data]) if has_buffers else event)
                if has_buffers:
                    self._losses_in_a_row = 0
        except PeerClosed:
            self._end_link(link)
        return events

    def _end_link(self, link: _WorkerLink) -> None:
        if not link.has_ended:
            link.has_ended = True
            self._selector.unregister(link.sock)
            link.sock.close()
            for entry in link.outgoing:
                for descriptor in entry.descriptors:
                    os.close(descriptor)
            link.outgoing.clear()

    def _read_template(self) -> list[Event]:
        assert self._control_reader is not None
        events: list[Event] = []
        try:
            while (frame := self._control_reader.read()) is not None:
                match frame[0]:
                    case AppImported(problem=problem):
                        if problem:
                            raise BadTask(problem)
                        self._has_imported = True
                    case WorkerForked(number=number, pid=pid):
                        link = self._links[number]
                        if link is not None:
                            link.pid = pid
                    case WorkerExited() as exited:
                        events += self._replace_worker(exited)
                    case _:
                        pass
        except PeerClosed:
            raise EngineFailed(self._describe_template_end()) from None
        return events

    def _replace_worker(self, exited: WorkerExited) -> list[Event]:
        link = self._links[exited.number]
        assert link is not None
        events = [] if link.has_ended else self._read_worker(link)  # what it sent before its end
        self._end_link(link)
        self._losses_in_a_row += 1
        reason = describe_exit(exited)
        if self._losses_in_a_row > MAX_LOSSES_IN_A_ROW:
            raise EngineFailed(
                f"{self._losses_in_a_row} workers ended one after the other without a reply "
                f"(limit {MAX_LOSSES_IN_A_ROW}). The last: {reason}"
            )
        self._start_worker(exited.number)
        return [*events, WorkerLost(exited.number, reason)]

    def _describe_template_end(self) -> str:
        assert self._template is not None
        with suppress(subprocess.TimeoutExpired):
            self._template.wait(1.0)
        code = self._template.returncode
        if not self._has_imported:
            return (
                f"the process that imports the task {_describe_code(code)} before the import was complete. "
                "Its output (in a simulation, the file workers.log) has the reason"
            )
        return f"the process that starts the workers {_describe_code(code)}. Start the simulation again"

    # --- end ----------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        workers = [link.pid for link in self._links if link is not None and link.pid]
        return [*([self._template.pid] if self._template else []), *workers]

    def close(self, *, at_once: bool = False) -> None:
        if not at_once and self._has_imported:
            self._close_workers()
        if self._control is not None:
            self._control.close()  # the template ends, and kills the workers that are left
        if self._template is not None:
            try:
                self._template.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self._template.kill()
                self._template.wait()
                for pid in self.processes()[1:]:
                    kill_group(pid)
        for link in self._links:
            if link is not None:
                self._end_link(link)
        for placed in self._payloads.values():
            if placed.descriptor is not None:
                os.close(placed.descriptor)
        self._payloads.clear()
        self._selector.close()
        os.close(self._awake)
        os.close(self._wake)

    def _close_workers(self) -> None:
        """Let the workers close their sessions, at most for `CLOSE_S`."""
        open_links = [link for link in self._links if link is not None and not link.has_ended]
        for link in open_links:
            self._send(link, CloseWorker())
        end = time.monotonic() + CLOSE_S
        while any(not link.has_ended for link in open_links) and (left_s := end - time.monotonic()) > 0:
            for key, mask in self._selector.select(left_s):
                link = key.data
                if isinstance(link, _WorkerLink):
                    if mask & selectors.EVENT_WRITE:
                        self._flush(link)
                    if mask & selectors.EVENT_READ:
                        self._read_worker(link)
                elif link is None:
                    with suppress(BlockingIOError):
                        os.read(self._awake, 4096)
                else:
                    with suppress(PeerClosed):
                        self._discard_reports()

    def _discard_reports(self) -> None:
        assert self._control_reader is not None
        while self._control_reader.read() is not None:
            pass


def describe_exit(exited: WorkerExited) -> str:
    """Describe in one line how a worker ended, and what to do."""
    text = f"worker {exited.number} (process {exited.pid}) {_describe_code(exited.exit_code)}"
    if exited.exit_code == -signal.SIGKILL:
        return (
            f"{text}. If no user killed it, this machine had no memory left: "
            "use fewer workers, fewer clients, or less data for each client"
        )
    if exited.exit_code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGABRT):
        return f"{text}: the fault is in a compiled library that the task uses"
    return f"{text}. Its output (in a simulation, the file workers.log) has the reason"


def _describe_code(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"
