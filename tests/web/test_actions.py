"""Actions on the dashboard, which need the token: start a run, roll back a model, roll out code."""

import json
from typing import Any

import pytest
from support import NatsServer, eventually
from support.browser import BrowserPage
from support.dashboard_page import IS_LIVE, SCREENSHOTS, find_button, models_of
from support.gateway import FED, TOKEN, run_dashboard
from support.simulated_federation import COMMIT, TASK, SimulatedFederation

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.catalogue import requests_answered_by
from fedbus.contracts.code import CodeData, RevertCode, RolloutBegun, RollOutCode
from fedbus.contracts.message import Body, Request
from fedbus.contracts.run import RunStarted, RunStopped, StartRun, StopRun

pytestmark = pytest.mark.timeout(240)


async def test_with_the_token_runs_are_started_and_models_rolled_back(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_server()
    received: list[object] = []

    async def start(request: StartRun) -> RunStarted:
        received.append(request)
        return RunStarted(run="mnist-1")

    async with (
        Bus.connect(nats.url, Identity(FED, "workflow-scheduler")) as scheduler,
        _serve_run_requests(scheduler, start),
        run_dashboard(page, nats.url, token=TOKEN, models=models_of) as url,
    ):
        await page.open(f"{url}/#/schedules")
        await page.wait_until(IS_LIVE)
        assert "Start a run" not in await page.text()
        await page.click("#unlock")
        await page.evaluate("document.querySelector('dialog input').value = 'correct-horse'")
        await page.click("dialog button.primary")
        await page.wait_until("document.querySelector('dialog').innerText.includes('Invalid token')")
        assert await page.evaluate("document.querySelector('dialog').open && !window.fedbus.store.mayAct")
        await page.screenshot(SCREENSHOTS / "token-wrong.png")
        await eventually(lambda: len(page.errors) == 1)  # Chromium logs the expected 401
        page.errors.clear()
        await page.evaluate(f"document.querySelector('dialog input').value = {json.dumps(TOKEN)}")
        await page.click("dialog button.primary")
        await page.wait_until("document.querySelector('main form')")
        await page.evaluate("document.querySelector('main form input').value = '3'")
        await page.click("main form button")
        await eventually(lambda: received == [StartRun(task=TASK, rounds=3, trigger="dashboard")])
        await page.wait_until("document.querySelector('.toast')?.textContent.includes('done')")
        await page.evaluate("location.hash = '#/models'")
        await page.wait_until(
            "[...document.querySelectorAll('main button')].some((one) => one.textContent === 'Roll back to v2')"
        )
        await page.screenshot(SCREENSHOTS / "models-unlocked.png")


async def test_with_the_token_code_is_rolled_out_and_reverted(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_server()
    await simulation.create_clients(["c1"])
    code = CodeData(task=TASK, code_version=COMMIT, source="https://example.org/tasks.git main")
    await simulation.transition(code, "code_read", "", "steady")
    received: list[Request[Body]] = []

    async def answer(request: Request[Body]) -> Body:
        received.append(request)
        return RolloutBegun(code_version=COMMIT)

    handlers = dict.fromkeys(requests_answered_by("server-manager"), answer)
    async with (
        Bus.connect(nats.url, Identity(FED, "server-manager")) as manager,
        manager.serve(handlers, task=TASK, version="1.0.0"),
        run_dashboard(page, nats.url, token=TOKEN, models=models_of) as url,
    ):
        await page.open(f"{url}/#/models")
        await page.wait_until(IS_LIVE)
        await page.evaluate(f"window.fedbus.store.unlock({json.dumps(TOKEN)})")
        await page.wait_until(f"{find_button('Roll out')}")
        await page.evaluate("document.querySelector('main form input').focus()")
        await page.send("Input.insertText", text="v2.")
        await simulation.create_server(3)  # a redraw must not interrupt the input
        await page.wait_until("window.fedbus.store.servers.get('mnist').body.facts.term === 3")
        await page.send("Input.insertText", text="1")
        await page.press("Enter")
        await page.wait_until("document.querySelector('dialog').open")
        assert "Roll out v2.1?" in await page.text("dialog")
        await page.click("dialog button.primary")
        await eventually(lambda: received == [RollOutCode(task=TASK, code_version="v2.1")])
        await page.wait_until("document.querySelector('.toast')?.textContent.includes('done')")
        await page.screenshot(SCREENSHOTS / "code-unlocked.png")
        await page.evaluate(f"{find_button('Revert')}.click()")
        await page.wait_until("document.querySelector('dialog').open")
        await page.click("dialog button.primary")
        await eventually(
            lambda: received[1:] == [RevertCode(task=TASK, reason="reverted from the dashboard")]
        )


def _serve_run_requests(scheduler: Bus, start: Any) -> Any:
    async def stop(request: StopRun) -> RunStopped:
        return RunStopped(run=request.run)

    return scheduler.serve({StartRun: start, StopRun: stop}, task=TASK, version="1.0.0")
