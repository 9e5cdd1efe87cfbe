"""Markup in messages: every page shows it as text."""

import json
from typing import Any

import pytest
from pydantic import BaseModel
from support import NatsServer
from support.browser import BrowserPage
from support.dashboard_page import IS_LIVE, PAGES, ROWS, SCREENSHOTS
from support.gateway import run_dashboard
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.contracts.client import ClientData, FlClientData, InferenceData
from fedbus.contracts.code import CodeData
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.message import Family, Message
from fedbus.contracts.run import RunData

MARKUP = (
    "<img src=x onerror=\"window.hurt=1\"><script>window.hurt=1</script><svg/onload='window.hurt=1'>"
    "\u202eright to left\u202c 🤖👩‍👩‍👧 ${window.hurt=1} javascript:window.hurt=1 " + "long" * 1500
)

pytestmark = pytest.mark.timeout(240)


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
