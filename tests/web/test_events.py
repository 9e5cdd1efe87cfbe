"""The page of events: filters, and the causes of an event."""

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import IS_LIVE, ROWS, SCREENSHOTS, find_button, simulate_run, tab_to
from support.gateway import run_dashboard
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.causation import cause_scope
from fedbus.contracts.client import ClientDeclined
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.server import UpdateReady

pytestmark = pytest.mark.timeout(240)


async def simulate_causes(simulation: SimulatedFederation) -> None:
    """Publish a chain of causes: run requested, server opens the run, update ready, c5 declines."""
    run = simulation.make_run_facts(3, 0)
    requested_id = await simulation.transition(
        run, "requested", "", "requested", "drift on 2 clients (c1, c2)"
    )
    with cause_scope(requested_id):
        opened_id = await simulation.create_server(3)
    with cause_scope(opened_id):
        update_ready_id = await simulation.publish(
            EXAMPLES[UpdateReady].model_copy(update={"task": TASK, "run": run.run}), agent="server-manager"
        )
    with cause_scope(update_ready_id):
        await simulation.publish(
            ClientDeclined(task=TASK, client="c5", run=run.run, reason="battery is 12 %")
        )


async def test_events_are_filtered_and_traced_to_their_root_cause(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    await simulate_causes(simulation)
    async with run_dashboard(page, nats.url, trace_url="https://traces.example/{trace_id}") as url:
        await page.open(f"{url}/#/events?client=c5&word=declined")
        await page.wait_until(f"{ROWS}.length === 1")
        await page.evaluate(f"{ROWS}[0].focus()")
        await page.press("Enter")
        await page.wait_until("document.querySelector('.drawer pre').textContent.includes('battery')")
        assert (
            await page.evaluate("document.querySelector('.drawer a').href")
            == f"https://traces.example/{simulation.trace_id}"
        )
        await page.evaluate(f"{find_button('Show causes')}.click()")
        await page.wait_until("document.querySelectorAll('.chain li').length === 4")
        steps = "[...document.querySelectorAll('.chain li button')].map((one) => one.textContent)"
        assert await page.evaluate(steps) == [
            "run transition",
            "server transition",
            "update ready",
            "declined",
        ]
        assert "Caused by 3 messages" in await page.text(".drawer")
        await page.screenshot(SCREENSHOTS / "events-chain.png")
        await page.set_viewport(width=400, height=844, is_dark=True)
        await page.screenshot(SCREENSHOTS / "events-chain-phone-dark.png")
        await page.evaluate("document.querySelector('.chain li button').click()")
        await page.wait_until("document.querySelector('.drawer').innerText.includes('drift on 2 clients')")
        await page.evaluate(f"{find_button('Show causes')}.click()")
        await page.wait_until("document.querySelector('.drawer').innerText.includes('No message caused it')")
        await page.evaluate(f"{find_button('Show trace')}.click()")
        await page.wait_until("document.querySelectorAll('.chain li').length > 20")
        await page.press("Escape")
        await page.wait_until("document.querySelector('.drawer').hidden")


async def test_a_filter_is_restored_after_a_reload(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/events")
        await page.wait_until(f"{ROWS}.length > 3")
        await tab_to(page, "input[name=text]")
        for letter in "battery":
            await page.send("Input.insertText", text=letter)
        await page.wait_until(f"{ROWS}.length === 1")
        assert await page.evaluate("location.hash") == "#/events?text=battery"
        await page.send("Page.reload")
        await page.wait_until(f"{IS_LIVE} && {ROWS}.length === 1")
        assert await page.evaluate("document.querySelector('input[name=text]').value") == "battery"
