"""What is seen from outside: log lines, traces and figures.

    with configured("fedbus-client-manager", client="c1"):
        ...

- **Lines** go to standard error: readable ones to a terminal, JSON otherwise, each with the trace and
  span it was written in and the event it is about (`lines`).
- **Spans** go into FEDBUS_HOME/traces, where `fedbus trace` finds them (`kept`).
- All three, figures too, go to an OTLP collector where the standard variables
  (OTEL_EXPORTER_OTLP_ENDPOINT, or one for a single signal) name one (`collector`).

Nobody listening there, or somebody slow, slows nothing down: what is told waits in bounded queues for
threads, complaints are one line a minute, and leaving takes FLUSH_S at the most, less where nothing went through.
OTEL_SDK_DISABLED=true turns spans and figures off altogether.
"""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from fedbus import __version__
from fedbus.app.telemetry.log_lines import log_to_stderr, written
from fedbus.app.telemetry_endpoints import any_named

if TYPE_CHECKING:
    from fedbus.app.telemetry.collector import Collector
    from fedbus.app.telemetry.span_files import Keeper

DISABLED: Final = "OTEL_SDK_DISABLED"

__all__ = ["configured", "log_to_stderr"]


@contextmanager
def configured(service: str, *, level: str = "INFO", **about: str) -> Iterator[None]:
    """Lines, traces and figures of this process as *service*, until the block ends; *about* goes with all of them."""
    log_to_stderr(level=level, agent=service.removeprefix("fedbus-"), **about)
    try:
        with nullcontext() if _is_disabled() else _told(_resource(service, about)):
            yield
    finally:
        written()  # a child process of ours ends without the goodbye of the interpreter


def _is_disabled() -> bool:
    return os.environ.get(DISABLED, "").strip().lower() == "true"


@contextmanager
def _told(resource: dict[str, str | int]) -> Iterator[None]:
    """Spans, and where a collector is named figures and lines."""
    keeper = _keeper(resource)
    with _collected(resource, keeper) if any_named() else _kept_here(keeper):
        yield


@contextmanager
def _kept_here(keeper: "Keeper | None") -> Iterator[None]:
    """Spans on this machine and nowhere else; they have their ids even where none is kept."""
    from opentelemetry import trace  # noqa: PLC0415

    from fedbus.app.telemetry.lite_tracer import LightProvider  # noqa: PLC0415

    provider = LightProvider(keeper.take, keeper.began) if keeper else LightProvider(lambda _: None)
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        if keeper:
            keeper.close()


@contextmanager
def _collected(resource: dict[str, str | int], keeper: "Keeper | None") -> Iterator[None]:
    """All three signals to a collector, spans on this machine too."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

    from fedbus.app.telemetry.collector import Collector  # noqa: PLC0415  # the SDK takes 0.2 s to import

    collector = Collector(Resource.create(dict(resource)))
    if keeper:
        collector.keep(keeper)
    collector.begin()
    try:
        yield
    finally:
        _leave(collector)


def _keeper(resource: dict[str, str | int]) -> "Keeper | None":
    from fedbus.app.settings import BadSetting, Settings  # noqa: PLC0415
    from fedbus.app.telemetry.span_files import Keeper  # noqa: PLC0415

    try:
        settings = Settings.from_environment()
    except BadSetting:  # whoever needs them says so
        return None
    if not settings.traces_mb:
        return None
    return Keeper(settings.traces_dir, resource, max_bytes=settings.traces_mb * 2**20)


def _resource(service: str, about: dict[str, str]) -> dict[str, str | int]:
    return {
        "service.name": service,
        "service.namespace": "fedbus",
        "service.version": __version__,
        "service.instance.id": "-".join([*about.values(), platform.node(), str(os.getpid())]),
        "host.name": platform.node(),
        "process.pid": os.getpid(),
        **{f"fedbus.{name}": value for name, value in about.items()},
    }


def _leave(collector: "Collector") -> None:
    """Send what waits, as long as the collector has us wait; then stop trying, which ends the exporters' retries."""
    until = time.monotonic() + collector.flush_s
    leaving = [
        threading.Thread(target=close, name="send the last", daemon=True) for close in collector.closes
    ]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in leaving):
        collector.give_up()
