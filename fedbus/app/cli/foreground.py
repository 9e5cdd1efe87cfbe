"""Run a coroutine as a process: signals, health file, telemetry."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

from fedbus.app import telemetry
from fedbus.app.entrypoints.health import report_health
from fedbus.app.entrypoints.signals import stop_on_signals
from fedbus.app.settings import NATS_MONITOR
from fedbus.app.telemetry.process_metrics import measure_process


def run_until_signal(
    work: Callable[[asyncio.Event], Any],
    name: str,
    *,
    level: str = "INFO",
    log_format: str = "json",
    **about: str,
) -> None:
    """Run *work* until it ends or a signal sets its stop event; *about* is added to each log line and span.

    *log_format* is the format of its log lines in a pipe: json, or console for a command that people start.
    """

    async def run() -> None:
        async with report_health():
            with stop_on_signals() as stop, measure_process(os.environ.get(NATS_MONITOR, "")):
                await work(stop)

    with telemetry.configure_telemetry(f"fedbus-{name}", level=level, log_format=log_format, **about):
        asyncio.run(run())
