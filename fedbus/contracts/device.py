"""The report of a device: the use of its resources, the agents that run on it, and its errors."""

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
    """Memory in use."""
    memory_total_bytes: int = Field(default=0, ge=0)


class DeviceReport(ClientMessage):
    """The current state of a device. Shares are from 0 to 1. Only the last report of each device is stored."""

    name: ClassVar[str] = "device_report"
    family: ClassVar[Family] = Family.CLIENT
    durable: ClassVar[bool] = False
    keeps_last_value: ClassVar[bool] = True

    cpu: float = Field(ge=0, le=1)
    memory: float = Field(ge=0, le=1)
    disk: float = Field(ge=0, le=1)
    temperature_c: float | None = None
    """The hottest sensor; None if the device has none."""
    gpus: tuple[GpuUse, ...] = Field(default=(), max_length=MAX_GPUS)
    agents: dict[str, bool] = Field(default_factory=dict, max_length=MAX_AGENTS)
    """True for each agent that runs, by name. Agents that have never run on this device are absent."""
    errors: int = Field(default=0, ge=0)
    """Error lines in the log of the device monitor's process since it started. With `fedbus client up` these are the
    errors of all agents, without those of child processes or of agents in processes of their own."""
    last_error: str = Field(default="", max_length=500)
