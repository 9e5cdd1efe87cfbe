"""The dashboard's pages for tests: what they show, what of them is looked at, and who walks through them."""

import json
from datetime import timedelta
from pathlib import Path

from fedbus.contracts.client import (
    ClientData,
    ClientDeclined,
    ClientJoined,
    FailTrain,
    FlClientData,
    RoundReply,
)
from fedbus.contracts.code import CodeData
from fedbus.contracts.run import RoundResult, RunData
from fedbus.contracts.scheduling import ScheduleData, ScheduleRule
from support.browser import BrowserPage
from support.simulated_federation import COMMIT, TASK, SimulatedFederation, make_model_ref

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PAGES = ("fleet", "runs", "training", "events", "models", "schedules")
UNNAMED_CONTROLS = """
    [...document.querySelectorAll("button, a, input, select, [role=region]")]
        .filter((one) => !one.closest("[hidden]"))
        .filter((one) => !(one.innerText.trim() || one.getAttribute("aria-label") || one.labels?.length))
        .map((one) => one.outerHTML)
"""
"""Controls that a screen reader could not name."""
IS_LIVE = "window.fedbus?.store.link === 'live'"
ROWS = "[...document.querySelectorAll('tr[data-key]')]"
FOCUSED_ELEMENT = """(() => {
    const here = document.activeElement;
    return [here.tagName.toLowerCase(), here.getAttribute("aria-label") ?? here.innerText?.trim() ?? ""];
})()"""
"""What has the focus, and what a screen reader calls it."""
NEXT_FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def find_button(name: str) -> str:
    """The button of this *name*, in the page."""
    return f"[...document.querySelectorAll('button')].find((one) => one.textContent === {json.dumps(name)})"


async def simulate_run(told: SimulatedFederation) -> RunData:
    """Three clients of six in a run's second round; one of them has failed."""
    await told.create_server()
    await told.create_clients([f"c{number}" for number in range(1, 7)])
    await told.transition(
        with_client_metrics(told.make_run_facts(1, 4, model=make_model_ref(2).model_dump())),
        "run_finished",
        "running",
        "finished",
    )
    told.advance(60)
    code = CodeData(task=TASK, code_version=COMMIT, source="https://example.org/tasks.git main")
    await told.transition(code, "code_read", "", "steady")
    await simulate_schedule(told)
    run = told.make_run_facts(2, 0, loss=0.37)
    for client in ("c1", "c2", "c3"):
        told.advance(0.5)
        doing = ClientData(
            task=TASK, client=client, run=run.run, model=make_model_ref(2), code_version=COMMIT
        )
        await told.transition(doing, "client_start", "serving", "learning", "run mnist-2", "the run to end")
        training = FlClientData(task=TASK, client=client, run=run.run)
        await told.transition(training, "client_start", "waiting", "pending")
        await told.publish(ClientJoined(task=TASK, client=client, run=run.run))
        told.advance(0.5)
        await told.transition(training, "round_started", "pending", "training")
    await told.publish(ClientDeclined(task=TASK, client="c4", run=run.run, reason="the battery is at 10 %"))
    for number in (1, 2):
        for client, took in (("c1", 3.0), ("c2", 4.0), ("c3", 5.5)):
            told.advance(2)
            await told.publish(make_reply(client, run.run, number, took))
        so_far = with_client_metrics(told.make_run_facts(2, number, loss=0.37, requested_at=run.requested_at))
        await told.transition(so_far, "round_finished", "running", "running")
    await told.publish(FailTrain(task=TASK, client="c3", run=run.run, reason="the trainer was killed"))
    lost = FlClientData(task=TASK, client="c3")
    await told.transition(lost, "failed", "training", "waiting", "the trainer was killed")
    return run


async def simulate_schedule(told: SimulatedFederation) -> None:
    """One of two parts, of which one is half there; it began the first run."""
    rule = ScheduleRule(
        when="cron '0 3 * * *' or (labelled >= 64 on 2 clients and every 6h)",
        timezone="Europe/Berlin",
        quiet="weekday in SAT..SUN",
        debounce_s=60,
    )
    facts = ScheduleData(
        task=TASK,
        holder="server/workflow-scheduler_1",
        since=told.clock,
        clock_since=told.clock,
        started=1,
        run="mnist-1",
        rule=rule,
        next_at=told.clock + timedelta(hours=5),
        awaits=("cron '0 3 * * *'", "labelled >= 64 on 2 clients (1 so far)"),
        fired_at=told.clock - timedelta(seconds=90),
        fired_for="labelled >= 64 on 2 clients (c1: 70, c2: 64)",
    )
    await told.transition(facts, "planned", "watching", "watching")


def with_client_metrics(run: RunData) -> RunData:
    """*run*, whose clients tell of themselves; c2 is not as good as the others, and c3 the slowest."""

    def told_by(one: RoundResult, number: int) -> dict[str, float]:
        loss = (one.loss or 0) * (1 + 0.15 * number)
        return {"train_loss": loss, "train_accuracy": 1 - loss / 2, "train_num-examples": 18000.0}

    def with_clients(one: RoundResult) -> RoundResult:
        clients = {client: number for number, client in enumerate(one.participants)}
        return one.model_copy(
            update={
                "figures": {client: told_by(one, number) for client, number in clients.items()},
                "train_s": {client: 3.0 + number for client, number in clients.items()},
                "transfer_s": {client: 0.4 + 0.2 * number for client, number in clients.items()},
                "wait_s": {client: 2.5 - 1.2 * number for client, number in clients.items()},
                "contributions": {client: 0.02 - 0.011 * number for client, number in clients.items()},
            }
        )

    return run.model_copy(update={"rounds": tuple(map(with_clients, run.rounds))})


def make_reply(client: str, run: str, number: int, took: float) -> RoundReply:
    return RoundReply(
        task=TASK,
        client=client,
        run=run,
        round=number,
        message_id=f"{client}-{number}",
        reply_to=str(number),
        created_at=0,
        ttl_s=60,
        train_s=took,
    )


async def press_keys(page: BrowserPage, *keys: str) -> tuple[str, str]:
    """Press *keys*; what has the focus then."""
    for key in keys:
        await page.press(key)
    kind, name = await page.evaluate(FOCUSED_ELEMENT)
    return kind, name


async def tab_to(page: BrowserPage, wanted: str, *, within: int = 40) -> str:
    """Press Tab until what has the focus is a *wanted* thing, by its selector; its name."""
    for _ in range(within):
        _, name = await press_keys(page, "Tab")
        if await page.evaluate(f"document.activeElement.matches({json.dumps(wanted)})"):
            return name
    raise AssertionError(f"Tab never comes to {wanted}")
