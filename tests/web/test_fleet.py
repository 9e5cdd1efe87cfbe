"""The page of the fleet: its table, and what it shows of a device."""

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import ROWS, SCREENSHOTS, tab_to
from support.gateway import run_dashboard
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.serving import CapturePaused, CaptureResumed

pytestmark = pytest.mark.timeout(240)


async def test_a_table_of_a_thousand_clients_has_few_rows_in_the_dom(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_clients([f"c{number}" for number in range(1, 1001)])
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until("document.querySelector('table')?.getAttribute('aria-rowcount') === '1001'")
        assert "1000\nof task mnist" in await page.text(".tiles")
        assert await page.evaluate(f"{ROWS}.length") < 60
        assert (await page.text("tr[data-key] td")).startswith("c1")
        await page.evaluate("document.querySelector('.tablebox .scroll').scrollTop = 1e9")
        await page.wait_until(f"{ROWS}.at(-1).textContent.startsWith('c1000')")
        await page.evaluate("[...document.querySelectorAll('th button')][0].click()")
        await page.wait_until("document.querySelector('th')?.getAttribute('aria-sort') === 'descending'")
        await page.screenshot(SCREENSHOTS / "fleet-1000.png")
        await tab_to(page, "main input[type=search]")
        await page.send("Input.insertText", text="c77")
        await page.wait_until(f"{ROWS}.length === 11")  # c77 and c770 to c779
        await page.wait_until("document.getElementById('spoken').textContent === '11 of 1000 clients shown'")


async def test_paused_capture_is_shown_until_it_resumes(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_clients(["c1"])
    await simulation.publish(CapturePaused(task=TASK, client="c1", reason="the disk is full"))
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(f"{ROWS}.length === 1")
        await page.click("tr[data-key]")
        await page.wait_until(
            "document.querySelector('.details').innerText.includes('Data capture paused since')"
        )
        simulation.advance(1)
        await simulation.publish(CaptureResumed(task=TASK, client="c1"))
        await page.wait_until("!document.querySelector('.details').innerText.includes('Data capture paused')")
