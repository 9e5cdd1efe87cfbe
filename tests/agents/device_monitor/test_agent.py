"""The health of a device: from real sensors, over a real bus."""

import asyncio
import subprocess
import sys
from functools import partial
from pathlib import Path

from support import eventually
from support.federation import FederationHarness

from fedbus.agents.common.device_sensors import parse_smi, read_device, read_sysfs_gpus
from fedbus.agents.common.liveness import hold_liveness_lock, read_agent_liveness
from fedbus.agents.device_monitor.agent import DeviceMonitor
from fedbus.app.composition.agents import device_monitor
from fedbus.contracts.device import DeviceReport, GpuUse
from fedbus.contracts.identifiers import client_id

HOLDS = """
import sys, time
from pathlib import Path
from fedbus.agents.common.liveness import hold_liveness_lock
with hold_liveness_lock(Path(sys.argv[1]), "inference"):
    print("here", flush=True)
    time.sleep(60)
"""


async def test_a_report_is_published_when_an_agent_starts_or_ends(
    fed: FederationHarness,
) -> None:
    device = fed.client_config("c1")
    async with (
        fed.bus.subscribe_ephemeral(DeviceReport, task=fed.config.task.id) as reports,
        fed.run_agent(partial(device_monitor, device)),
    ):
        first = await asyncio.wait_for(anext(reports), 20)
        assert isinstance(first, DeviceReport)
        assert (first.client, first.agents) == ("c1", {})
        assert 0 < first.memory <= 1
        assert 0 < first.disk <= 1

        with hold_liveness_lock(device.directory, "inference"):
            assert (await asyncio.wait_for(anext(reports), 20)).agents == {"inference": True}  # type: ignore[attr-defined]  # the iterator yields any message
        assert (await asyncio.wait_for(anext(reports), 20)).agents == {"inference": False}  # type: ignore[attr-defined]  # the iterator yields any message


async def test_a_report_has_the_error_count_and_the_last_error(
    fed: FederationHarness, tmp_path: Path
) -> None:
    bus = await fed.connect_as("device-monitor", "c1")
    monitor = DeviceMonitor(
        bus, fed.config.task, client_id("c1"), directory=tmp_path, errors=lambda: (3, "x" * 1000)
    )
    async with (
        fed.bus.subscribe_ephemeral(DeviceReport, task=fed.config.task.id) as reports,
        fed.run_agent(monitor.run),
    ):
        report = await asyncio.wait_for(anext(reports), 20)

    assert isinstance(report, DeviceReport)
    assert (report.errors, report.last_error) == (3, "x" * 500)


async def test_a_killed_agent_is_reported_as_not_alive(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as agent:  # noqa: ASYNC220
        assert agent.stdout
        assert agent.stdout.readline() == b"here\n"
        assert read_agent_liveness(tmp_path) == {"inference": True}
        agent.kill()
    await eventually(lambda: read_agent_liveness(tmp_path) == {"inference": False})


def test_the_readings_of_this_machine_are_shares(tmp_path: Path) -> None:
    reading = read_device(tmp_path)

    assert all(0 <= share <= 1 for share in (reading.cpu, reading.memory, reading.disk))


def test_unknown_values_of_nvidia_smi_count_as_zero() -> None:
    output = "NVIDIA H200, 37, 1024, 143771\nOrin (nvgpu), [N/A], [N/A], [N/A]\nnot a line of it\n"

    assert list(parse_smi(output)) == [
        GpuUse(
            name="NVIDIA H200", utilization=0.37, memory_bytes=1024**3, memory_total_bytes=143771 * 1024**2
        ),
        GpuUse(name="Orin (nvgpu)", utilization=0),
    ]


def test_gpus_without_a_tool_are_read_from_sysfs(tmp_path: Path) -> None:
    jetson, amd, broken = (
        tmp_path / "devices/gpu.0/load",
        tmp_path / "class/drm/card0/device/gpu_busy_percent",
        tmp_path / "class/drm/card1/device/gpu_busy_percent",
    )
    for file, text in ((jetson, "250\n"), (amd, "40\n"), (broken, "busy\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)

    assert [(gpu.name, gpu.utilization) for gpu in read_sysfs_gpus(tmp_path)] == [
        ("Jetson", 0.25),
        ("AMD", 0.4),
    ]
