"""Measure how many events a second the dashboard can show, and whether its page stays responsive.

    python -m benchmarks.dashboard_feed [--rate 1000] [--seconds 20]

A real nats-server, the gateway in a separate process, and a real Chromium on the Events page, all on this machine.
Events are published at the given rate. The results are ratios within one run: the share of events that the page has
at the end, its delay, and the duration of a frame under load relative to the idle page.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.browser import BrowserPage, run_chromium
from support.gateway import FED
from support.nats_server import free_port, nats_server
from support.simulated_federation import TASK, SimulatedFederation
from support.waiting import eventually

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientDeclined
from fedbus.contracts.envelope import make_envelope, pack

TICK_S = 0.02
FRAMES = """
(async (ms) => {
    const found = [];
    const end = performance.now() + ms;
    let last = performance.now();
    while (performance.now() < end) {
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        found.push(now - last);
        last = now;
    }
    found.sort((a, b) => a - b);
    const at = (share) => found[Math.min(found.length - 1, Math.floor(found.length * share))];
    return {frames: found.length, median: at(0.5), p95: at(0.95), longest: at(1)};
})
"""


@asynccontextmanager
async def gateway_process(url: str, home: str) -> AsyncIterator[str]:
    port = free_port()
    environment = {
        "FEDBUS_NATS_URL": url,
        "FEDBUS_FEDERATION": FED,
        "FEDBUS_HOME": home,
        "PATH": "/usr/bin:/bin",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedbus.app.cli.main",
        "gateway",
        "--port",
        str(port),
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def is_listening() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(is_listening, within_s=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def publish_events(bus: Bus, rate: float, seconds: float) -> int:
    """Publish *rate* events a second without waiting for acknowledgements. Returns their number."""
    published, start = 0, time.monotonic()
    source = f"fedbus/{bus.fed}/client-manager"
    while (elapsed := time.monotonic() - start) < seconds:
        for _ in range(int(elapsed * rate) - published):
            message = ClientDeclined(
                task=TASK, client=f"c{published % 1000}", run="mnist-1", reason="the battery is at 10 %"
            )
            headers = make_envelope(message, source=f"{source}/{message.client}").headers()
            await bus._client.publish(subjects.subject_for(bus.fed, message), pack(message), headers=headers)  # noqa: SLF001
            published += 1
        await asyncio.sleep(TICK_S)
    return published


async def measure(page: BrowserPage, bus: Bus, rate: float, seconds: float) -> dict[str, object]:
    idle = await page.evaluate(f"{FRAMES}(3000)")
    frames = asyncio.ensure_future(page.evaluate(f"{FRAMES}({int(seconds * 1000)})"))
    published = await publish_events(bus, rate, seconds)
    end = time.monotonic()
    count_at_end = int(await page.evaluate("window.fedbus.store.count"))
    await page.wait_until(f"window.fedbus.store.count >= {published}", within_s=120)
    delay_s = time.monotonic() - end
    loaded = await frames
    return {
        "published": published,
        "events_per_s": round(published / seconds),
        "reached_at_the_end": round(count_at_end / published, 4),
        "reached_in_total": round(int(await page.evaluate("window.fedbus.store.count")) / published, 4),
        "delay_s": round(delay_s, 2),
        "frame_ms_idle": idle,
        "frame_ms_under_load": loaded,
        "frames_under_load_to_idle": round((loaded["frames"] / seconds) / (idle["frames"] / 3), 3),
    }


async def main(rate: float, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        (directory / "nats").mkdir()
        async with (
            nats_server(directory / "nats") as nats,
            Bus.connect(nats.url, Identity(FED, "test")) as bus,
        ):
            await bus.create_streams()
            await SimulatedFederation(bus).create_clients([f"c{number}" for number in range(1000)])
            async with gateway_process(nats.url, home) as url, run_chromium(directory / "profile") as page:
                await page.set_viewport()
                await page.open(f"{url}/#/events")
                await page.wait_until("window.fedbus?.store.link === 'live'")
                await page.evaluate("window.fedbus.store.count = 0")
                print(json.dumps(await measure(page, bus, rate, seconds), indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rate", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    asyncio.run(main(options.rate, options.seconds))
