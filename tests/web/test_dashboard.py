"""All pages of the dashboard in Chromium: with a run, with no client, and with a corrupt model repository.

The tests write screenshots of all pages to ``build/screenshots``.
"""

import json

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import IS_LIVE, PAGES, SCREENSHOTS, UNNAMED_CONTROLS, models_of, simulate_run
from support.gateway import run_dashboard
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.server import ServerData, StoreProblem

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("name", "width", "height", "is_dark"),
    [
        ("light", 1280, 860, False),
        ("dark", 1280, 860, True),
        ("phone", 400, 844, False),
        ("phone-dark", 400, 844, True),
    ],
)
async def test_each_page_shows_the_state(
    simulation: SimulatedFederation,
    nats: NatsServer,
    page: BrowserPage,
    name: str,
    width: int,
    height: int,
    is_dark: bool,
) -> None:
    await simulate_run(simulation)
    await page.set_viewport(width=width, height=height, is_dark=is_dark)
    expected = {
        "fleet": "the battery is at 10 %",
        "runs": "2 of 4",
        "training": "mnist-1",
        "events": "the trainer was killed",
        "models": "v6",
        "schedules": "labelled >= 64 on 2 clients (1 so far)",
    }
    async with run_dashboard(page, nats.url, models=models_of) as url:
        await page.open(url)
        await page.wait_until(IS_LIVE)
        for page_name in PAGES:
            await page.evaluate(f"location.hash = '#/{page_name}'")
            await page.wait_until(
                f"document.querySelector('main').textContent.includes({json.dumps(expected[page_name])})"
            )
            if page_name == "runs":
                await page.wait_until("document.querySelector('.gantt g')")
            assert await page.evaluate(UNNAMED_CONTROLS) == [], page_name
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{page_name} is too wide"
            )
            await page.screenshot(SCREENSHOTS / f"{page_name}-{name}.png")


async def test_a_corrupt_model_repository_is_shown_with_its_reason(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_server()
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(IS_LIVE)
        facts = ServerData(task=TASK, trouble=StoreProblem.DAMAGED)
        await simulation.transition(facts, "store_unavailable", "waiting", "waiting", "v2 has another digest")
        await page.wait_until(
            "document.querySelector('main').innerText.toLowerCase().includes('model repository damaged')"
        )
        await page.evaluate("location.hash = '#/events'")
        await page.wait_until(
            "document.querySelector('main').innerText.includes('store_unavailable (damaged): v2')"
        )
        await page.screenshot(SCREENSHOTS / "store-damaged.png")


async def test_the_pages_of_an_empty_federation_show_the_next_step(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    async with run_dashboard(page, nats.url) as url:
        await page.open(url)
        await page.wait_until(IS_LIVE)
        for page_name in PAGES:
            await page.evaluate(f"location.hash = '#/{page_name}'")
            await page.wait_until(
                f"window.fedbus.app.name === '{page_name}' && document.querySelector('.blank h2, .runlist h2')"
            )
            await page.wait_until("document.querySelector('main .blank code')")
            await page.screenshot(SCREENSHOTS / f"{page_name}-empty.png")
