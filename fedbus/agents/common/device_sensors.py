"""What a device's own instruments show: processors, memory, disk, heat and GPUs. Blocking; call it in a thread.

GPUs are found without a driver's library: NVIDIA's by its own ``nvidia-smi``, Jetsons and AMD's in sysfs.
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
"""In thousandths; where it lies depends on the board."""
AMD_BUSY: Final = "class/drm/card*/device/gpu_busy_percent"


@dataclass(frozen=True)
class DeviceReading:
    """Shares from 0 to 1; degrees Celsius."""

    cpu: float
    memory: float
    disk: float
    temperature_c: float | None
    gpus: tuple[GpuUse, ...]


def read_device(disk: Path) -> DeviceReading:
    """How things stand now; *disk*: a directory on the disk that counts. Processors: on average since the last call."""
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
    if not hasattr(psutil, "sensors_temperatures"):  # as on macOS
        return None
    return max(
        (one.current for group in psutil.sensors_temperatures().values() for one in group), default=None
    )


def read_nvidia_gpus() -> list[GpuUse]:
    """What ``nvidia-smi`` says; nothing where there is none, or where it does not answer."""
    if shutil.which(SMI) is None:
        return []
    try:
        said = subprocess.run(
            [SMI, *SMI_QUERY], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return list(parse_smi(said.stdout))


def parse_smi(said: str) -> Iterator[GpuUse]:
    """The lines of ``nvidia-smi``; what it calls [N/A] counts as nothing, for a Jetson or a slice of a GPU."""
    for row in csv.reader(said.splitlines(), skipinitialspace=True):
        if len(row) == 4:
            name, busy, used, total = row
            yield GpuUse(
                name=name[:200],
                utilization=_share(_parse_number(busy)),
                memory_bytes=int(_parse_number(used) * MIB),
                memory_total_bytes=int(_parse_number(total) * MIB),
            )


def read_sysfs_gpus(sysfs: Path) -> list[GpuUse]:
    """Jetsons and AMD's, as the kernel tells of them under *sysfs*."""
    found = []
    for pattern, name, whole in (*((one, "Jetson", 1000) for one in JETSON_LOADS), (AMD_BUSY, "AMD", 100)):
        for path in sorted(sysfs.glob(pattern)):
            with suppress(OSError, ValueError):
                found.append(GpuUse(name=name, utilization=_share(int(path.read_text()) * 100 / whole)))
    return found


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
