"""The pages of the dashboard in a browser: simulated contents, queries, and keyboard control."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

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
"""Controls without an accessible name."""
IS_LIVE = "window.fedbus?.store.link === 'live'"
ROWS = "[...document.querySelectorAll('tr[data-key]')]"
FOCUSED_ELEMENT = """(() => {
    const here = document.activeElement;
    return [here.tagName.toLowerCase(), here.getAttribute("aria-label") ?? here.innerText?.trim() ?? ""];
})()"""
"""The tag and the accessible name of the focused element."""
DELAYED_RESPONSE = """
    const real = window.fetch;
    window.fetch = async (path, ...rest) => {
        const response = await real(path, ...rest);
        if (String(path).startsWith("PATH")) await new Promise((go) => (window.go = go));
        return response;
    };
"""
"""Delays the responses whose path starts with PATH until the test calls ``go``."""
NEXT_FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def find_button(name: str) -> str:
    """The expression for the button with the text *name*."""
    return f"[...document.querySelectorAll('button')].find((one) => one.textContent === {json.dumps(name)})"


async def simulate_run(simulation: SimulatedFederation) -> RunData:
    """Simulate a run in its second round, with three clients of six, one of which has failed."""
    await simulation.create_server()
    await simulation.create_clients([f"c{number}" for number in range(1, 7)])
    await simulation.transition(
        with_client_metrics(simulation.make_run_facts(1, 4, model=make_model_ref(2).model_dump())),
        "run_finished",
        "running",
        "finished",
    )
    simulation.advance(60)
    code = CodeData(task=TASK, code_version=COMMIT, source="https://example.org/tasks.git main")
    await simulation.transition(code, "code_read", "", "steady")
    await simulate_schedule(simulation)
    run = simulation.make_run_facts(2, 0, loss=0.37)
    for client in ("c1", "c2", "c3"):
        simulation.advance(0.5)
        doing = ClientData(
            task=TASK, client=client, run=run.run, model=make_model_ref(2), code_version=COMMIT
        )
        await simulation.transition(
            doing, "client_start", "serving", "learning", "run mnist-2", "the run to end"
        )
        training = FlClientData(task=TASK, client=client, run=run.run)
        await simulation.transition(training, "client_start", "waiting", "pending")
        await simulation.publish(ClientJoined(task=TASK, client=client, run=run.run))
        simulation.advance(0.5)
        await simulation.transition(training, "round_started", "pending", "training")
    await simulation.publish(
        ClientDeclined(task=TASK, client="c4", run=run.run, reason="the battery is at 10 %")
    )
    for number in (1, 2):
        for client, took in (("c1", 3.0), ("c2", 4.0), ("c3", 5.5)):
            simulation.advance(2)
            await simulation.publish(make_reply(client, run.run, number, took))
        so_far = with_client_metrics(
            simulation.make_run_facts(2, number, loss=0.37, requested_at=run.requested_at)
        )
        await simulation.transition(so_far, "round_finished", "running", "running")
    await simulation.publish(FailTrain(task=TASK, client="c3", run=run.run, reason="the trainer was killed"))
    lost = FlClientData(task=TASK, client="c3")
    await simulation.transition(lost, "failed", "training", "waiting", "the trainer was killed")
    return run


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


async def simulate_schedule(simulation: SimulatedFederation) -> None:
    """Simulate a schedule with two conditions, one of which is half met. It has started the first run."""
    rule = ScheduleRule(
        when="cron '0 3 * * *' or (labelled >= 64 on 2 clients and every 6h)",
        timezone="Europe/Berlin",
        quiet="weekday in SAT..SUN",
        debounce_s=60,
    )
    facts = ScheduleData(
        task=TASK,
        holder="server/workflow-scheduler_1",
        since=simulation.clock,
        clock_since=simulation.clock,
        started=1,
        run="mnist-1",
        rule=rule,
        next_at=simulation.clock + timedelta(hours=5),
        awaits=("cron '0 3 * * *'", "labelled >= 64 on 2 clients (1 so far)"),
        fired_at=simulation.clock - timedelta(seconds=90),
        fired_for="labelled >= 64 on 2 clients (c1: 70, c2: 64)",
    )
    await simulation.transition(facts, "planned", "watching", "watching")


def with_client_metrics(run: RunData) -> RunData:
    """*run* with metrics of each client; c2 has a higher loss, and c3 is the slowest."""

    def client_metrics(one: RoundResult, number: int) -> dict[str, float]:
        loss = (one.loss or 0) * (1 + 0.15 * number)
        return {"train_loss": loss, "train_accuracy": 1 - loss / 2, "train_num-examples": 18000.0}

    def with_clients(one: RoundResult) -> RoundResult:
        clients = {client: number for number, client in enumerate(one.participants)}
        return one.model_copy(
            update={
                "figures": {client: client_metrics(one, number) for client, number in clients.items()},
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
    """Press *keys*, and return the tag and name of the focused element."""
    for key in keys:
        await page.press(key)
    kind, name = await page.evaluate(FOCUSED_ELEMENT)
    return kind, name


async def tab_to(page: BrowserPage, selector: str, *, within: int = 40) -> str:
    """Press Tab until the focused element matches *selector*, and return its name."""
    for _ in range(within):
        _, name = await press_keys(page, "Tab")
        if await page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return name
    raise AssertionError(f"Tab does not reach {selector} within {within} steps")
