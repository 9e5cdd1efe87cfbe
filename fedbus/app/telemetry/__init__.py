"""What is seen from outside: log lines, traces and figures.

    with configured("fedbus-client-manager", client="c1"):
        ...

- **Lines** go to standard error: readable ones to a terminal, JSON otherwise, each with the trace and
  span it was written in and the event it is about (`lines`).
- **Spans** go into FEDBUS_HOME/traces, where `fedbus trace` finds them (`kept`).
- All three, figures too, go to an OTLP collector where the standard variables
  (OTEL_EXPORTER_OTLP_ENDPOINT, or one for a single signal) name one (`collector`).

Nobody listening there, or somebody slow, slows nothing down: what is told waits in bounded queues for
threads, complaints are one line a minute, and leaving takes FLUSH_S at the most.
OTEL_SDK_DISABLED=true turns spans and figures off altogether.
"""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from fedbus.app.telemetry.lines import log_to_stderr

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from fedbus.app.telemetry.collector import Collector

FLUSH_S: Final = 2.0
DISABLED: Final = "OTEL_SDK_DISABLED"

__all__ = ["configured", "log_to_stderr"]


@contextmanager
def configured(service: str, *, level: str = "INFO", **about: str) -> Iterator[None]:
    """Lines, traces and figures of this process as *service*, until the block ends; *about* goes with all of them."""
    log_to_stderr(level=level, agent=service.removeprefix("fedbus-"), **about)
    if os.environ.get(DISABLED, "").strip().lower() == "true":
        yield
        return
    from fedbus.app.telemetry.collector import Collector  # noqa: PLC0415  # the SDK takes 0.2 s to import

    collector = Collector(_resource(service, about))
    _keep_spans(collector)
    collector.begin()
    try:
        yield
    finally:
        _leave(collector)


def _keep_spans(collector: "Collector") -> None:
    """In a file, too, for `fedbus trace`."""
    from fedbus.app.settings import BadSetting, Settings  # noqa: PLC0415
    from fedbus.app.telemetry.kept import KeptSpans  # noqa: PLC0415

    try:
        settings = Settings.from_environment()
    except BadSetting:  # whoever needs them says so
        return
    if settings.traces_mb:
        collector.also(
            KeptSpans(settings.traces_dir, collector.resource, max_bytes=settings.traces_mb * 2**20)
        )


def _resource(service: str, about: dict[str, str]) -> "Resource":
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

    from fedbus import __version__  # noqa: PLC0415

    return Resource.create(
        {
            "service.name": service,
            "service.namespace": "fedbus",
            "service.version": __version__,
            "service.instance.id": "-".join([*about.values(), platform.node(), str(os.getpid())]),
            "host.name": platform.node(),
            "process.pid": os.getpid(),
            **{f"fedbus.{name}": value for name, value in about.items()},
        }
    )


def _leave(collector: "Collector") -> None:
    """Send what waits, for FLUSH_S; then stop trying, which ends the exporters' retries."""
    until = time.monotonic() + FLUSH_S
    leaving = [
        threading.Thread(target=close, name="send the last", daemon=True) for close in collector.closes
    ]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in leaving):
        collector.give_up()
