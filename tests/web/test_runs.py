"""The page of runs: the facts and the timeline of a run, and the list."""

import pytest
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import (
    DELAYED_RESPONSE,
    IS_LIVE,
    NEXT_FRAME,
    ROWS,
    SCREENSHOTS,
    make_reply,
    simulate_run,
)
from support.gateway import run_dashboard
from support.simulated_federation import SimulatedFederation

pytestmark = pytest.mark.timeout(240)


async def test_a_run_in_a_mode_shows_staleness_and_late_updates(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    facts = simulation.make_run_facts(1, 2)
    update = {"mode": "buffered", "updates": 10, "late_merged": 2, "late_dropped": 1}
    stale = facts.rounds[-1].model_copy(update={**update, "staleness": {"c1": 0, "c2": 3, "c3": 1}})
    plan = facts.plan.model_copy(update={"aggregation": {"mode": "buffered", "buffer-size": 10}})
    facts = facts.model_copy(update={"rounds": (*facts.rounds[:-1], stale), "plan": plan})
    await simulation.transition(facts, "run_finished", "running", "finished")
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/runs/{facts.run}")
        await page.wait_until("document.querySelectorAll('main tbody tr').length >= 3")
        text = await page.text("main")
        assert "buffered, buffer-size=10" in text
        row = await page.evaluate(
            "[...document.querySelectorAll('main tbody tr')].at(-1).innerText.split('\\t')"
        )
        assert row[-5:] == ["10", "2", "1", "c2 3, c3 1", "–"]
        await page.screenshot(SCREENSHOTS / "run-buffered.png")
        await page.evaluate("location.hash = '#/training'")
        await page.wait_until(f"{IS_LIVE} && {ROWS}.some((row) => row.innerText.includes('3.0'))")


async def test_a_message_during_the_load_of_a_timeline_is_drawn_once(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulate_run(simulation)
    bars = "[...document.querySelectorAll('.gantt title')]"
    third = f"{bars}.filter((one) => one.textContent.includes('c2: round 3')).length"
    async with run_dashboard(page, nats.url) as url:
        await page.open(f"{url}/#/fleet")
        await page.wait_until(IS_LIVE)
        await page.evaluate(f"{{{DELAYED_RESPONSE.replace('PATH', 'api/runs/')}}}")
        await page.evaluate("location.hash = '#/runs'")
        await page.wait_until("window.go")
        assert await page.text(".run .readout") == "Loading the timeline…"
        await simulation.publish(make_reply("c2", "mnist-2", 3, 4.5))
        await page.wait_until("window.fedbus.store.recent.some((one) => one.body.round === 3)")
        await page.evaluate(NEXT_FRAME)
        await page.evaluate("window.go()")
        await page.wait_until(f"{third} === 1")
        await page.evaluate(
            "window.fedbus.app.page.update({type: 'news', records: window.fedbus.store.recent})"
        )
        assert await page.evaluate(third) == 1


async def test_the_selected_run_is_scrolled_into_view(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    for number in range(1, 31):
        simulation.advance(1)
        await simulation.transition(
            simulation.make_run_facts(number, 4), "run_finished", "running", "finished"
        )
    is_in_view = """(() => {
        const [one, all] = [".runlist [aria-current]", ".runlist"]
            .map((name) => document.querySelector(name).getBoundingClientRect());
        return [one.top - all.top, all.bottom - one.bottom, one.left - all.left, all.right - one.right]
            .every((room) => room > -1);
    })()"""
    async with run_dashboard(page, nats.url) as url:
        await page.open(url)
        await page.wait_until(IS_LIVE)
        for width, height in ((1280, 860), (390, 844)):
            await page.evaluate("location.hash = '#/fleet'")
            await page.set_viewport(width=width, height=height)
            await page.evaluate("location.hash = '#/runs/mnist-2'")
            await page.wait_until(
                "document.querySelector('.run .readout')?.innerText.startsWith('Point at a bar')"
            )
            assert await page.evaluate(is_in_view), f"at width {width}"
