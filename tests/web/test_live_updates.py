"""The state in the browser: how it loads, follows the events and survives a disconnection."""

from urllib.parse import urlsplit

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import DELAYED_RESPONSE, IS_LIVE, ROWS, SCREENSHOTS, make_reply, simulate_run
from support.gateway import run_dashboard, run_gateway
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.client import ClientDeclined

pytestmark = pytest.mark.timeout(240)


async def test_an_open_page_is_updated_live(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(f"{ROWS}.length === 6")
        await simulation.create_clients(["c7"])
        await page.wait_until(f"{ROWS}.some((row) => row.textContent.startsWith('c7'))")
        await page.evaluate("location.hash = '#/runs'")
        await page.wait_until("document.querySelector('.gantt g')")
        await simulation.publish(make_reply("c2", "mnist-2", 3, 4.5))
        await page.wait_until(
            "[...document.querySelectorAll('title')].some((one) => one.textContent.includes('c2: round 3'))"
        )


async def test_no_event_is_lost_in_a_reload_or_reconnection(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_clients(["c1"])
    reasons = (
        "window.fedbus.store.recent.filter((one) => one.word === 'declined').map((one) => one.body.reason)"
    )
    async with run_gateway(nats.url) as url:
        port = urlsplit(url).port or 0
        await page.open(f"{url}/#/events")
        await page.wait_until(IS_LIVE)
        await simulation.publish(ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="one"))
        await page.wait_until(f"{reasons}.length === 1")
    await page.wait_until("!document.getElementById('banner').hidden")
    banner = await page.text("#banner")
    assert "no event will be lost" in banner
    await page.wait_until("window.fedbus.store.tries > 2")
    assert await page.text("#banner") == banner, "the time in the banner is that of the disconnection"
    await page.screenshot(SCREENSHOTS / "lost.png")
    await simulation.publish(ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="two"))
    async with run_dashboard(page, nats.url, port=port):
        await page.wait_until("document.getElementById('banner').hidden")
        await simulation.publish(ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="three"))
        await page.wait_until(f"{reasons}.length === 3")
        assert await page.evaluate(reasons) == ["one", "two", "three"]
        await page.send("Page.reload")
        await page.wait_until(f"{IS_LIVE} && {reasons}.length === 3")
        assert await page.evaluate(reasons) == ["one", "two", "three"]
    page.errors.clear()  # Chromium logs the expected disconnection


async def test_while_the_state_loads_no_empty_federation_is_shown(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    await page.send(
        "Page.addScriptToEvaluateOnNewDocument", source=DELAYED_RESPONSE.replace("PATH", "api/state")
    )
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until("window.go")
        assert await page.text("main") == "Loading the state of the federation…"
        await page.evaluate("window.go()")
        await page.wait_until(f"{IS_LIVE} && {ROWS}.length === 6")
