"""Accessibility of the dashboard in Chromium: keyboard, screen reader and mouse, with live updates."""

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import (
    IS_LIVE,
    NEXT_FRAME,
    PAGES,
    ROWS,
    SCREENSHOTS,
    UNNAMED_CONTROLS,
    make_reply,
    press_keys,
    simulate_run,
    tab_to,
)
from support.gateway import run_dashboard
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.client import (
    ClientDeclined,
)

pytestmark = pytest.mark.timeout(240)


async def test_each_control_has_an_accessible_name(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(url)
        await page.wait_until(IS_LIVE)
        for page_name in PAGES:
            await page.evaluate(f"location.hash = '#/{page_name}'")
            await page.wait_until(
                f"document.querySelector('main h1') && window.fedbus.app.name === '{page_name}'"
            )
            assert await page.evaluate(UNNAMED_CONTROLS) == [], page_name
            assert await page.evaluate("document.querySelectorAll('nav [aria-current=page]').length") == 1
            assert await page.evaluate("document.querySelectorAll('h1').length") == 1


async def test_the_skip_link_moves_the_focus_to_the_content(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/training")
        await page.wait_until("document.querySelector('.chart svg')")
        assert await press_keys(page, "Tab") == ("a", "Skip to the content")
        assert (await press_keys(page, "Enter"))[0] == "main"
        assert await page.evaluate("window.fedbus.app.name") == "training"
        assert await press_keys(page, "Tab") == ("button", "Log loss")


async def test_rows_are_selected_by_arrow_keys_and_opened_by_enter(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(f"{ROWS}.length === 6")
        assert (await tab_to(page, "tr[data-key]")).startswith("c1")
        assert (await press_keys(page, "ArrowDown", "ArrowDown"))[1].startswith("c3")
        assert (await press_keys(page, "ArrowUp"))[1].startswith("c2")
        assert (await press_keys(page, "End"))[1].startswith("c6")
        assert (await press_keys(page, "Home", "ArrowDown"))[1].startswith("c2")
        await press_keys(page, "Enter")
        await page.wait_until("document.querySelector('.details:not([hidden]) h2')?.textContent === 'c2'")
        assert await press_keys(page, "Tab") == ("button", "Close"), "Tab leaves the table after one row"
        await page.evaluate("location.hash = '#/events?word=declined'")
        await page.wait_until(f"window.fedbus.app.name === 'events' && {ROWS}.length === 1")
        await tab_to(page, "tr[data-key]")
        await press_keys(page, "Enter")
        await page.wait_until("!document.querySelector('.drawer').hidden")
        assert await press_keys(page, "Tab") == ("button", "Close")
        kind, name = await press_keys(page, "Escape")
        assert (kind, "declined" in name) == ("tr", True), "Escape restores the focus"


async def test_the_timeline_is_readable_by_arrow_keys_and_as_a_table(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/runs")
        await page.wait_until("document.querySelectorAll('.gantt g').length > 2")
        assert (await tab_to(page, ".gantt .bar")).startswith("c1: client learning (run mnist-2), ")
        names = [(await press_keys(page, "ArrowRight"))[1] for _ in range(4)]
        assert names[-1].startswith("c1: round 2, trained for 3.0 s, ")
        assert names[-1].endswith(", for 3.0 s")
        assert (await press_keys(page, "ArrowDown"))[1].startswith("c2: round 2, trained for 4.0 s")
        assert (await press_keys(page, "Home"))[1].startswith("c2: client learning")
        assert (await page.text(".run .readout")).startswith("c2: client learning")
        await page.screenshot(SCREENSHOTS / "runs-keyboard.png")
        await simulation.publish(make_reply("c2", "mnist-2", 3, 4.5))  # a new bar must not move the focus
        await page.wait_until("document.querySelector('.ganttbox').textContent.includes('c2: round 3')")
        assert (await press_keys(page, "End"))[1].startswith("c2: round 3")
        assert (await tab_to(page, "summary")) == "Timeline as a table"
        await press_keys(page, "Enter")
        await page.wait_until("document.querySelector('.run details table')")
        rows = "[...document.querySelectorAll('.run details tbody tr')].map((row) => row.innerText)"
        assert any(
            row.startswith("c3") and "round 2, trained for 5.5 s" in row for row in await page.evaluate(rows)
        )
        await page.screenshot(SCREENSHOTS / "runs-table.png")


async def test_a_redraw_during_a_click_does_not_change_its_target(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(f"{ROWS}.length === 6")
        x, y = await page.evaluate(
            f"(() => {{ const box = {ROWS}[1].getBoundingClientRect(); return [box.x + 9, box.y + 9]; }})()"
        )
        mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
        await page.send("Input.dispatchMouseEvent", type="mousePressed", **mouse)
        await simulation.create_clients(["c7"])
        await page.wait_until("window.fedbus.store.clients.size === 7")
        await page.evaluate(NEXT_FRAME)
        await page.send("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
        await page.wait_until("document.querySelector('.details:not([hidden]) h2')?.textContent === 'c2'")
        await page.wait_until(f"{ROWS}.length === 7")
        await page.screenshot(SCREENSHOTS / "fleet-client.png")


async def test_a_redraw_during_a_key_press_does_not_change_its_target(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    run = await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/training")
        await page.wait_until(f"{ROWS}.length === 3")
        await page.evaluate(f"{ROWS}[2].querySelector('input').focus()")
        await page.send_key("keyDown", " ")
        next_state = simulation.make_run_facts(2, 3, requested_at=run.requested_at)
        await simulation.transition(next_state, "round_finished", "running", "running")
        await page.wait_until(
            "window.fedbus.store.recent.some((one) => one.body.facts?.rounds?.at(-1)?.round === 3)"
        )
        await page.evaluate(NEXT_FRAME)
        await page.send_key("keyUp", " ")
        await page.wait_until("document.querySelector('.chart .keys').innerText === 'c3'")


async def test_an_update_keeps_the_focus_and_the_scroll_position(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    long_run = simulation.make_run_facts(3, 25, of=40)
    await simulation.transition(long_run, "round_finished", "running", "running")
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/runs/mnist-3")
        await page.wait_until("document.querySelectorAll('[aria-label=Rounds] tbody tr').length === 26")
        await page.wait_until(
            "document.querySelector('.run .readout').innerText.startsWith('Point at a bar')"
        )
        await tab_to(page, ".runlist a[href='#/runs/mnist-1']")
        await page.evaluate("document.querySelector('[aria-label=Rounds]').scrollTop = 200")
        next_state = simulation.make_run_facts(3, 26, of=40, requested_at=long_run.requested_at)
        await simulation.transition(next_state, "round_finished", "running", "running")
        await page.wait_until("document.querySelector('.run').innerText.includes('26 of 40')")
        assert await page.evaluate("document.querySelector('[aria-label=Rounds]').scrollTop") == 200
        assert await page.evaluate("document.activeElement.getAttribute('href')") == "#/runs/mnist-1"


async def test_messages_are_not_announced_to_screen_readers(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/events")
        await page.wait_until(f"{IS_LIVE} && {ROWS}.length > 3")
        await page.evaluate(
            "window.read = 0;"
            "for (const one of document.querySelectorAll('[aria-live], [role=status], [role=alert], output'))"
            " new MutationObserver(() => window.read++)"
            ".observe(one, {childList: true, subtree: true, characterData: true})"
        )
        for number in range(3):
            reason = f"reason {number}"
            await simulation.publish(ClientDeclined(task=TASK, client="c4", run="mnist-2", reason=reason))
            await page.wait_until(f"{ROWS}[0].textContent.includes('{reason}')")
        assert await page.evaluate("window.read") == 0
