"""What a device tells of itself: how much of it is in use, which of its agents run, what went wrong."""

from typing import ClassVar

from pydantic import Field

from fedbus.contracts.message import Body, ClientMessage, Family

MAX_GPUS = 64
MAX_AGENTS = 32


class GpuUse(Body):
    """One GPU of a device."""

    name: str = Field(max_length=200)
    utilization: float = Field(ge=0, le=1)
    memory_bytes: int = Field(default=0, ge=0)
    """In use."""
    memory_total_bytes: int = Field(default=0, ge=0)


class DeviceReport(ClientMessage):
    """How the device is now. Shares are from 0 to 1. Of each device the last one is kept: it says it best."""

    word: ClassVar[str] = "device_report"
    family: ClassVar[Family] = Family.CLIENT
    durable: ClassVar[bool] = False
    keeps_last_value: ClassVar[bool] = True

    cpu: float = Field(ge=0, le=1)
    memory: float = Field(ge=0, le=1)
    disk: float = Field(ge=0, le=1)
    temperature_c: float | None = None
    """Of the hottest sensor, where there is any."""
    gpus: tuple[GpuUse, ...] = Field(default=(), max_length=MAX_GPUS)
    agents: dict[str, bool] = Field(default_factory=dict, max_length=MAX_AGENTS)
    """Which of its agents run, by name; one that has never run here is not named."""
    errors: int = Field(default=0, ge=0)
    """Error lines since the monitor started, of the process it runs in: with `fedbus client up`, of all agents there.

    Not those of child processes, nor of agents that run alone."""
    last_error: str = Field(default="", max_length=500)
