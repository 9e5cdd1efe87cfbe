"""The page of training: statistics of each client, and the scale of its charts."""

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import ROWS, SCREENSHOTS, find_button, simulate_run
from support.gateway import run_dashboard
from support.simulated_federation import SimulatedFederation

pytestmark = pytest.mark.timeout(240)


async def test_the_training_page_shows_statistics_of_each_client(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/training")
        await page.wait_until(f"{ROWS}.length === 3")
        cells = f"{ROWS}.map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"
        assert (await page.evaluate(cells))[1] == [
            "c2",
            "6",
            "0",
            "0.8280 → 0.2723",
            "0.5860 → 0.8638",
            "4.0 s · 600 ms · 1.3 s",
            "–",
            "88 %",
            "0.009",
        ]
        await page.evaluate(f"{ROWS}[2].querySelector('input').focus()")
        await page.press(" ")
        await page.wait_until("document.querySelector('.chart .keys').innerText === 'c3'")
        assert await page.evaluate("document.activeElement.closest('tr').dataset.key") == "c3"
        assert "Loss on each client" in await page.text(".charts")
        await page.screenshot(SCREENSHOTS / "training-client.png")


async def test_the_loss_can_be_shown_on_a_logarithmic_scale(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    ticks = (
        "[...document.querySelectorAll('.chart')].map((one) =>"
        " [...one.querySelectorAll('text[text-anchor=end]')].map((tick) => tick.textContent))"
    )
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/training")
        await page.wait_until("document.querySelector('.chart svg')")
        before = await page.evaluate(ticks)
        await page.evaluate(f"{find_button('Compared')}.click()")
        await page.evaluate(f"{find_button('Log loss')}.click()")
        after = await page.evaluate(ticks)
        assert before[0] == ["0.2", "0.4", "0.6", "0.8"]
        assert after == [["0.3", "0.4", "0.6", "0.8", "1"], before[1]]
        await page.screenshot(SCREENSHOTS / "training-compared.png")
