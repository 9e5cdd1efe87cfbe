"""The pages of the dashboard in Chromium, with live data and hostile data.

The tests write screenshots of all pages to ``build/screenshots``.
"""

import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel
from support import NatsServer, eventually
from support.browser import BrowserPage
from support.dashboard_page import (
    IS_LIVE,
    NEXT_FRAME,
    PAGES,
    ROWS,
    SCREENSHOTS,
    UNNAMED_CONTROLS,
    find_button,
    make_reply,
    simulate_run,
    tab_to,
)
from support.gateway import FED, TOKEN, run_dashboard, run_gateway
from support.simulated_federation import COMMIT, TASK, SimulatedFederation, make_model_ref

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.catalogue import requests_answered_by
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.client import (
    ClientData,
    ClientDeclined,
    FlClientData,
    InferenceData,
)
from fedbus.contracts.code import CodeData, RevertCode, RolloutBegun, RollOutCode
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.message import Body, Family, Message, Request
from fedbus.contracts.run import RunData, RunStarted, RunStopped, StartRun, StopRun
from fedbus.contracts.server import ServerData, StoreProblem, UpdateReady
from fedbus.contracts.serving import CapturePaused, CaptureResumed

MARKUP = (
    "<img src=x onerror=\"window.hurt=1\"><script>window.hurt=1</script><svg/onload='window.hurt=1'>"
    "\u202eright to left\u202c 🤖👩‍👩‍👧 ${window.hurt=1} javascript:window.hurt=1 " + "long" * 1500
)

pytestmark = pytest.mark.timeout(240)


async def models_of(task: str) -> dict[str, Any]:
    """Describe six versions in two lineages; the first lineage forks."""
    common = {
        "created": "2026-03-14T12:00:00Z",
        "code_version": COMMIT,
        "rounds": 4,
        "participants": {"c1": 9},
    }
    parents = {1: None, 2: 1, 3: 2, 4: 2, 5: None, 6: 5}
    versions = [
        make_model_ref(version).model_dump()
        | common
        | {
            "task": task,
            "parent": parent,
            "run": f"{task}-{version}" if parent else None,
            "lineage": 2 if version > 4 else 1,
            "metrics": {"accuracy": 0.9},
            "seal": None,
        }
        for version, parent in parents.items()
    ]
    champion = {"version": 3, "term": 2, "before": [2], "since": "2026-03-14T12:00:00Z", "reason": "better"}
    return {"store": "", "versions": versions, "champion": champion, "error": ""}


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


def make_hostile(kind: type[Message]) -> Message:
    """Return the example of *kind* with markup in each free-text field."""
    example = EXAMPLES[kind]
    return _hostile_body(example)  # type: ignore[return-value]


def _hostile_body(body: BaseModel) -> BaseModel:
    changed = body
    for name in type(body).model_fields:
        value = getattr(body, name)
        for hostile in _hostile_values(value):
            try:
                changed = type(body).model_validate(changed.model_dump() | {name: hostile})
            except ValueError:
                continue  # an id, a digest or an enum: not a free text
            break
    return changed


def _hostile_values(value: object) -> list[object]:
    match value:
        case str():
            return [MARKUP, MARKUP[:200]]
        case dict():
            return [
                {MARKUP: MARKUP},
                {MARKUP: next(iter(value.values()), 1.0)},
                dict.fromkeys(value, MARKUP),
            ]
        case tuple():
            return [[MARKUP]]
        case BaseModel():
            return [_hostile_body(value).model_dump()]
        case _:
            return []


async def test_markup_in_messages_is_shown_as_text(
    simulation: SimulatedFederation, nats: NatsServer, page: BrowserPage
) -> None:
    await simulation.create_clients(["c1"])
    for kind in EXAMPLES:
        message = make_hostile(kind)
        if message.family not in (Family.SVC, Family.LIFE) and message.durable:
            await simulation.publish(message)
    key: dict[str, Any] = {"task": TASK, "client": "c1"}
    client = ClientData(**key, code_version=MARKUP, labels={MARKUP: MARKUP})
    await simulation.transition(client, MARKUP, "serving", MARKUP, MARKUP, MARKUP)
    await simulation.transition(FlClientData(**key), MARKUP, "waiting", MARKUP, MARKUP)
    await simulation.transition(InferenceData(**key, endpoint=MARKUP), MARKUP, "serving", MARKUP, MARKUP)
    run = simulation.make_run_facts(
        1, 2, trigger=MARKUP, code_version=MARKUP, cohort=(MARKUP,), trace_id=MARKUP
    )
    rounds = [one.model_dump() | {"failures": {MARKUP: MARKUP}} for one in run.rounds]
    hostile_run = RunData.model_validate(run.model_dump() | {"rounds": rounds})
    await simulation.transition(hostile_run, MARKUP, "recruiting", MARKUP, MARKUP)
    await simulation.create_server(cohort=(MARKUP,))
    await simulation.transition(
        CodeData(task=TASK, source=MARKUP, candidate=MARKUP, stages=(MARKUP,), rejected={MARKUP: MARKUP}),
        MARKUP,
        "",
        MARKUP,
    )
    async with run_dashboard(page, nats.url, trace_url="javascript:window.hurt=1//{trace_id}") as url:
        await page.open(url)
        await page.wait_until(IS_LIVE)
        for page_name in PAGES:
            await page.evaluate(f"location.hash = '#/{page_name}'")
            await page.wait_until(
                f"document.querySelector('main h1') && window.fedbus.app.name === '{page_name}'"
            )
            await page.wait_until("document.querySelector('main').textContent.includes('<img src=x')")
            if page_name in ("fleet", "events"):
                await page.wait_until(f"{ROWS}.length > 0")
                await page.click("tr[data-key]")
                await page.wait_until(
                    "document.querySelector('aside:not([hidden])').textContent.includes('<img')"
                )
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{page_name} is too wide"
            )
            await page.screenshot(SCREENSHOTS / f"{page_name}-hostile.png")
        injected = "main img, main script, aside img, aside script, a[href^=javascript]"
        assert await page.evaluate(f"document.querySelectorAll({json.dumps(injected)}).length") == 0
        assert await page.evaluate("window.hurt === undefined")


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


DELAYED_RESPONSE = """
    const real = window.fetch;
    window.fetch = async (path, ...rest) => {
        const response = await real(path, ...rest);
        if (String(path).startsWith("PATH")) await new Promise((go) => (window.go = go));
        return response;
    };
"""
"""Delays the responses whose path starts with PATH until the test calls ``go``."""


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
