"""Read a device's sensors: CPU, memory, disk, temperature and GPUs. Blocking: call it in a thread.

GPUs are read without a driver library: NVIDIA by ``nvidia-smi``, Jetson and AMD by sysfs.
"""

import csv
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from fedbus.contracts.device import MAX_GPUS, GpuUse

SMI: Final = "nvidia-smi"
SMI_QUERY: Final = (
    "--query-gpu=name,utilization.gpu,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)
SMI_TIMEOUT_S: Final = 5.0
MIB: Final = 1024**2
SYSFS: Final = Path("/sys")
JETSON_LOADS: Final = (
    "devices/gpu.0/load",
    "devices/platform/gpu.0/load",
    "devices/platform/bus@0/*.gpu/load",
)
"""In thousandths; the path depends on the board."""
AMD_BUSY: Final = "class/drm/card*/device/gpu_busy_percent"


@dataclass(frozen=True)
class DeviceReading:
    """One reading of the sensors. *cpu*, *memory* and *disk* are shares from 0 to 1."""

    cpu: float
    memory: float
    disk: float
    temperature_c: float | None
    gpus: tuple[GpuUse, ...]


def read_device(disk: Path) -> DeviceReading:
    """Read all sensors. *disk* is a directory on the measured disk; CPU usage is the average since the last call."""
    return DeviceReading(
        cpu=_share(psutil.cpu_percent(interval=None)),
        memory=_share(psutil.virtual_memory().percent),
        disk=_share(psutil.disk_usage(str(disk)).percent),
        temperature_c=_max_temperature_c(),
        gpus=tuple([*read_nvidia_gpus(), *read_sysfs_gpus(SYSFS)][:MAX_GPUS]),
    )


def _share(percent: float) -> float:
    return min(1.0, max(0.0, percent / 100))


def _max_temperature_c() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):  # missing on macOS
        return None
    return max(
        (one.current for group in psutil.sensors_temperatures().values() for one in group), default=None
    )


def read_nvidia_gpus() -> list[GpuUse]:
    """Read the GPUs from ``nvidia-smi``; empty if it is not installed or fails."""
    if shutil.which(SMI) is None:
        return []
    try:
        result = subprocess.run(
            [SMI, *SMI_QUERY], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return list(parse_smi(result.stdout))


def parse_smi(output: str) -> Iterator[GpuUse]:
    """Parse the output of ``nvidia-smi``; [N/A], as for a Jetson or a MIG slice, counts as 0."""
    for row in csv.reader(output.splitlines(), skipinitialspace=True):
        if len(row) == 4:
            name, busy, used, total = row
            yield GpuUse(
                name=name[:200],
                utilization=_share(_parse_number(busy)),
                memory_bytes=int(_parse_number(used) * MIB),
                memory_total_bytes=int(_parse_number(total) * MIB),
            )


def read_sysfs_gpus(sysfs: Path) -> list[GpuUse]:
    """Read the Jetson and AMD GPUs from the kernel's files under *sysfs*."""
    gpus = []
    for pattern, name, maximum in (*((one, "Jetson", 1000) for one in JETSON_LOADS), (AMD_BUSY, "AMD", 100)):
        for path in sorted(sysfs.glob(pattern)):
            with suppress(OSError, ValueError):
                gpus.append(GpuUse(name=name, utilization=_share(int(path.read_text()) * 100 / maximum)))
    return gpus


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
