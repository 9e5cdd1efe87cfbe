"""The device monitor: publishes the health of one device, as messages and as metrics.

    every 15 s, and at once when an agent starts or ends: device_report

It takes no decisions: the client manager decides whether the device trains.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.device_sensors import DeviceReading, read_device
from fedbus.agents.common.liveness import read_agent_liveness
from fedbus.bus.bus import Bus
from fedbus.contracts.device import DeviceReport, GpuUse
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.task.task import Task
from fedbus.contracts.telemetry import (
    AGENTS_ALIVE,
    CLIENT,
    CPU,
    DISK,
    GPU,
    GPU_MEMORY,
    MEMORY,
    TEMPERATURE,
    Attributes,
    Metric,
    observable_gauge,
)

PUBLISH_INTERVAL_S: Final = 15.0
AGENT_POLL_S: Final = 1.0
"""The interval for polling the liveness locks."""

ReadErrors = Callable[[], tuple[int, str]]
"""Returns the number of logged errors, and the last one."""
GaugeValues = Iterable[tuple[float, Attributes]]


@log_method_calls
class DeviceMonitor:
    """Publishes the health of a client's device. *directory* has its agents' liveness locks, on the measured disk."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        client: ClientId,
        *,
        directory: Path,
        errors: ReadErrors = lambda: (0, ""),
        every_s: float = PUBLISH_INTERVAL_S,
    ) -> None:
        self._bus = bus
        self._task = task
        self._client = client
        self._directory = directory
        self._errors = errors
        self._every_s = every_s
        self._reading: DeviceReading | None = None
        self._agents: dict[str, bool] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until *stop* is set."""
        await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
        with ExitStack() as gauges:
            for metric, read in self._gauges().items():
                gauges.enter_context(observable_gauge(metric, read))
            while not stop.is_set():
                await self._publish_health()
                await wait_for_first(stop.wait(), asyncio.sleep(self._every_s), self._wait_for_agent_change())

    async def _publish_health(self) -> None:
        self._reading = await asyncio.to_thread(read_device, self._directory)
        self._agents = await asyncio.to_thread(read_agent_liveness, self._directory)
        errors, last = self._errors()
        await self._bus.publish(
            DeviceReport(
                task=self._task.id,
                client=self._client,
                cpu=self._reading.cpu,
                memory=self._reading.memory,
                disk=self._reading.disk,
                temperature_c=self._reading.temperature_c,
                gpus=self._reading.gpus,
                agents=self._agents,
                errors=errors,
                last_error=last[:500],
            )
        )

    async def _wait_for_agent_change(self) -> None:
        while await asyncio.to_thread(read_agent_liveness, self._directory) == self._agents:  # noqa: ASYNC110 - see below
            await asyncio.sleep(AGENT_POLL_S)  # the kernel has no notification for a released lock

    def _gauges(self) -> Mapping[Metric, Callable[[], GaugeValues]]:
        """Return the gauges, which show the last reading."""
        client = {CLIENT: str(self._client)}

        def gauge_of(name: str) -> Callable[[], GaugeValues]:
            def read() -> GaugeValues:
                value = getattr(self._reading, name, None)
                return [] if value is None else [(value, client)]

            return read

        return {
            CPU: gauge_of("cpu"),
            MEMORY: gauge_of("memory"),
            DISK: gauge_of("disk"),
            TEMPERATURE: gauge_of("temperature_c"),
            GPU: lambda: [
                (gpu.utilization, client | {"hw.id": number}) for number, gpu in self._gpu_samples()
            ],
            GPU_MEMORY: lambda: [
                (gpu.memory_bytes, client | {"hw.id": number}) for number, gpu in self._gpu_samples()
            ],
            AGENTS_ALIVE: lambda: [
                (float(alive), client | {"fedbus.agent": name}) for name, alive in self._agents.items()
            ],
        }

    def _gpu_samples(self) -> list[tuple[str, GpuUse]]:
        return [(str(number), gpu) for number, gpu in enumerate(self._reading.gpus if self._reading else ())]
