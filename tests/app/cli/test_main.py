"""The command line as separate processes with a real nats-server: output, exit codes and one-line errors."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import pytest
from support import NatsServer, eventually
from support.cli import FedbusCli

from fedbus import __version__
from fedbus.agents.common.child_process import ChildProcess
from fedbus.app.diagnostics.doctor import check_clock
from fedbus.app.finding import Severity
from fedbus.app.settings import Settings
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, ClientData, ClientEvent, FinTrain
from fedbus.contracts.code import CodePublished
from fedbus.contracts.examples import MODEL, RESULT
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.run import RUN, RunData, RunEvent, RunPlan, RunStarted, RunStopped, StartRun, StopRun
from fedbus.contracts.server import SERVER, ServerData

DEV = FederationId("dev")


@pytest.fixture
def fedbus(tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home")


@pytest.fixture
async def bus(nats: NatsServer, fedbus: FedbusCli) -> AsyncIterator[Bus]:
    """The bus of the server side; `fedbus` finds its federation."""
    fedbus.environment["FEDBUS_NATS_URL"] = nats.url
    async with Bus.connect(nats.url, Identity(DEV, "workflow-scheduler")) as bus:
        await bus.create_streams()
        yield bus


RUNS = {1: "recruiting_started quorum_reached", 2: "recruiting_started", 10: "recruiting_started"}


async def simulate_runs(bus: Bus) -> None:
    """Create three runs: 1 has finished, 2 has failed, 10 is recruiting."""
    async with LifecycleStore.open(bus) as lifecycles:
        server = await lifecycles.load(SERVER, ServerData(task="mnist"))
        await server.create()
        for number in (1, 2, 10):
            facts = RunData(
                task="mnist", run=f"mnist-{number}", plan=RunPlan(rounds=4), requested_at=datetime.now(UTC)
            )
            run = await lifecycles.load(RUN, facts)
            await run.create()
            await run.transition(RunEvent.RECRUITING_STARTED)
            if number == 1:
                await run.transition(RunEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")})
                await run.transition(RunEvent.ROUND_FINISHED, {"rounds": (RESULT,)})
                await run.transition(RunEvent.RUN_FINISHED, {"model": MODEL})
            if number == 2:
                await run.transition(RunEvent.RECRUITING_EXPIRED, reason="c2 and c3 did not come")


# --- main ----------------------------------------------------------------------------------------


async def test_help_lists_the_commands_and_the_exit_codes(fedbus: FedbusCli) -> None:
    began = time.monotonic()
    result = await fedbus("--help")

    assert result.code == 0
    assert time.monotonic() - began < 60, "it waited for a timeout"
    assert all(name in result.out for name in ("run", "clients", "events", "task", "doctor", "version"))
    assert "nats-server unreachable" in result.out


async def test_version_prints_what_a_bug_report_needs(fedbus: FedbusCli) -> None:
    result = await fedbus("version", "--json")
    assert result.facts["fedbus"] == __version__
    assert result.facts["nats-server"].startswith("2.")


async def test_an_unknown_command_is_a_usage_error(fedbus: FedbusCli) -> None:
    result = await fedbus("rnu", "ls")
    assert result.code == 2
    assert "No such command 'rnu'" in result.err


@pytest.mark.parametrize("words", [("run", "ls"), ("events", "tail")])
async def test_no_bus_is_one_line_and_code_3(fedbus: FedbusCli, words: tuple[str, ...]) -> None:
    result = await fedbus(*words, FEDBUS_NATS_URL="nats://127.0.0.1:9")

    assert (result.code, result.out) == (3, "")
    assert result.err == (
        "fedbus: no nats-server at nats://127.0.0.1:9: Connection refused. "
        "Start one (fedbus up) or set FEDBUS_NATS_URL\n"
    )


async def test_a_bad_setting_is_one_line_and_code_2(fedbus: FedbusCli) -> None:
    result = await fedbus("run", "ls", FEDBUS_FEDERATION="All Clinics")
    assert result.code == 2
    assert result.err.startswith(
        "fedbus: FEDBUS_FEDERATION: 'All Clinics' is not a valid federation id: use 1 to 63"
    )


async def test_a_bus_without_the_federation_is_one_line_and_code_5(
    fedbus: FedbusCli, nats: NatsServer
) -> None:
    result = await fedbus("run", "ls", FEDBUS_NATS_URL=nats.url)
    assert result.code == 5
    assert result.err.startswith(
        "fedbus: federation dev not found on this NATS server. Start its server side"
    )


async def test_debug_shows_the_traceback(fedbus: FedbusCli) -> None:
    result = await fedbus("run", "ls", FEDBUS_NATS_URL="nats://127.0.0.1:9", FEDBUS_DEBUG="1")
    assert result.code == 1
    assert "Traceback" in result.err


async def test_a_running_bus_is_found_without_a_flag(fedbus: FedbusCli, bus: Bus) -> None:
    settings = Settings.from_environment(fedbus.environment)
    with settings.announce_url(fedbus.environment.pop("FEDBUS_NATS_URL")):
        assert (await fedbus("run", "ls")).code == 0


# --- runs ----------------------------------------------------------------------------------------------


async def test_runs_are_listed_in_the_order_of_their_numbers(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    facts = (await fedbus("run", "ls", "--json")).facts
    shown = (await fedbus("run", "ls")).out.splitlines()

    assert [(run["run"], run["state"]) for run in facts] == [
        ("mnist-1", "finished"),
        ("mnist-2", "failed"),
        ("mnist-10", "recruiting"),
    ]
    assert (facts[0]["loss"], facts[0]["accuracy"], facts[0]["model_version"]) == (0.25, 0.9375, 2)
    assert [line.split()[0] for line in shown] == ["run", "mnist-1", "mnist-2", "mnist-10"]
    assert "0.2500" in shown[1]


async def test_without_runs_the_note_shows_how_to_start_one(fedbus: FedbusCli, bus: Bus) -> None:
    result = await fedbus("run", "ls")
    assert (result.code, result.out, result.err) == (0, "", "no runs yet. Start one: fedbus run start\n")


async def test_a_run_is_shown_round_by_round(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    result = await fedbus("run", "show", "mnist-1")

    assert result.code == 0
    assert "c1 (18000), c2 (18000)" in result.out
    assert "c3: no reply within 120 s" in result.out


async def test_a_run_in_a_mode_shows_its_late_updates(fedbus: FedbusCli, bus: Bus) -> None:
    buffered = RESULT.model_copy(
        update={"mode": "buffered", "updates": 10, "staleness": {"c1": 0, "c2": 3}, "late_merged": 1}
    )
    plan = RunPlan(rounds=4, aggregation={"mode": "buffered", "buffer-size": 10})
    async with LifecycleStore.open(bus) as lifecycles:
        facts = RunData(task="mnist", run="mnist-1", plan=plan, requested_at=datetime.now(UTC))
        run = await lifecycles.load(RUN, facts)
        await run.create()
        await run.transition(RunEvent.RECRUITING_STARTED)
        await run.transition(RunEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")})
        await run.transition(RunEvent.ROUND_FINISHED, {"rounds": (buffered,)})

    shown = (await fedbus("run", "show", "mnist-1")).out
    assert "aggregation        buffered, buffer-size=10" in shown
    (row,) = [line for line in shown.splitlines() if "c1 (18000)" in line]
    assert "10       1              c2 3       c1 (18000)" in row
    facts_of_run = (await fedbus("run", "show", "mnist-1", "--json")).facts
    assert facts_of_run["rounds"][0]["staleness"] == {"c1": 0, "c2": 3}


async def test_an_unknown_run_is_one_line_and_code_5(fedbus: FedbusCli, bus: Bus) -> None:
    for words in (("show",), ("watch",), ("stop",)):
        result = await fedbus("run", *words, "mnist-7")
        assert (result.code, result.err) == (
            5,
            "fedbus: no run mnist-7 in this federation. See: fedbus run ls\n",
        )


async def test_watch_prints_all_transitions_and_ends_with_the_run(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    finished, failed = await asyncio.gather(
        fedbus("run", "watch", "mnist-1"), fedbus("run", "watch", "mnist-2", "--json")
    )

    assert finished.code == 0
    assert "requested → recruiting" in finished.out
    assert "round 2 loss:0.25,accuracy:0.9375" in finished.out
    assert [json.loads(line)["body"]["target"] for line in failed.out.splitlines()] == [
        "requested",
        "recruiting",
        "failed",
    ]
    assert (failed.code, failed.err) == (1, "fedbus: run mnist-2 failed: c2 and c3 did not come\n")


async def test_a_request_reaches_the_scheduler_and_is_answered(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    requests: list[Body] = []

    async def start(request: StartRun) -> Body:
        requests.append(request)
        return (
            RunStarted(run="mnist-11")
            if request.rounds != 99
            else Refused(reason="run mnist-10 is still recruiting")
        )

    async def stop(request: StopRun) -> Body:
        requests.append(request)
        return RunStopped(run=request.run)

    async with bus.serve({StartRun: start, StopRun: stop}, task="mnist", version=__version__):
        started = await fedbus("run", "start", "--rounds", "4", "-c", "lr=0.1", "-c", "name=x", "--json")
        mode = ("--mode", "buffered", "--aggregation", "buffer-size=5")
        buffered = await fedbus("run", "start", *mode, "--json")
        refused = await fedbus("run", "start", "--rounds", "99")
        stopped = await fedbus("run", "stop", "mnist-10", "--reason", "enough")

    assert (started.code, started.facts) == (0, {"run": "mnist-11"})
    assert requests[0] == StartRun(task="mnist", rounds=4, config={"lr": 0.1, "name": "x"})
    assert (refused.code, refused.err) == (1, "fedbus: run mnist-10 is still recruiting\n")
    assert (stopped.code, stopped.out) == (0, "run mnist-10 is being cancelled\n")
    assert buffered.code == 0
    assert requests[1] == StartRun(task="mnist", aggregation={"mode": "buffered", "buffer-size": 5})
    assert requests[3] == StopRun(task="mnist", run="mnist-10", reason="enough")


async def test_a_missing_agent_is_one_line_and_code_4(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    result = await fedbus("run", "start")
    assert (result.code, result.err) == (
        4,
        "fedbus: no reply to start_run: no agent serves it. Check that the workflow-scheduler is running\n",
    )


async def test_a_run_before_the_first_task_names_fedbus_up(fedbus: FedbusCli, bus: Bus) -> None:
    result = await fedbus("run", "start")
    assert (result.code, result.err) == (
        5,
        "fedbus: federation dev has no task yet. Start one with fedbus up, or wait until it has started\n",
    )


async def test_an_unknown_task_is_reported_with_the_known_ones(fedbus: FedbusCli, bus: Bus) -> None:
    await simulate_runs(bus)
    result = await fedbus("run", "start", "--task", "cifar")
    assert (result.code, result.err) == (
        5,
        "fedbus: federation dev has no task cifar. Choose one of: mnist\n",
    )


async def test_an_override_without_a_value_is_a_usage_error(fedbus: FedbusCli) -> None:
    result = await fedbus("run", "start", "-c", "lr")
    assert result.code == 2
    assert result.err == "fedbus: 'lr' is not an override. Use name=value, for example --config lr=0.1\n"


# --- clients ---------------------------------------------------------------------------------------------


async def test_clients_are_listed_and_shown_with_what_they_wait_for(
    fedbus: FedbusCli, bus: Bus, nats: NatsServer
) -> None:
    async with (
        Bus.connect(nats.url, Identity(DEV, "client-manager", "c1")) as of_c1,
        LifecycleStore.open(of_c1) as lifecycles,
    ):
        client = await lifecycles.load(CLIENT, ClientData(client="c1", task="mnist"))
        await client.create()
        await client.transition(ClientEvent.MODEL_FETCHED, {"model": MODEL})
    worth = RESULT.model_copy(update={"train_s": {"c1": 4.5}, "contributions": {"c1": 0.125}})
    async with LifecycleStore.open(bus) as lifecycles:
        plan, now = RunPlan(), datetime.now(UTC)
        run = await lifecycles.load(
            RUN, RunData(task="mnist", run="mnist-1", plan=plan, requested_at=now, rounds=(worth,))
        )
        await run.create()
    listed, shown, unknown = await asyncio.gather(
        fedbus("clients", "ls", "--json"), fedbus("clients", "show", "c1"), fedbus("clients", "show", "c9")
    )

    (facts,) = listed.facts
    assert (facts["client"], facts["task"], facts["state"]) == ("c1", "mnist", "pending_application")
    assert (facts["model_version"], facts["sha256"]) == (
        None,
        None,
    )  # its inference agent has not reported one
    assert (facts["standing"]["rounds"], facts["standing"]["contribution"]) == (1, 0.125)
    assert "the inference agent to load the model" in shown.out
    assert "so far: 1 round, 0 failed, reliability 0.67, 18000 samples, 4.50 s per training" in shown.out
    assert (unknown.code, unknown.err) == (5, "fedbus: no client c9 in this federation. Known clients: c1\n")


# --- events ----------------------------------------------------------------------------------------------


async def test_tail_orders_the_messages_of_both_streams_by_time(
    fedbus: FedbusCli, bus: Bus, nats: NatsServer
) -> None:
    await bus.publish(CodePublished(task="mnist", code_version="a" * 40))
    async with LifecycleStore.open(bus) as lifecycles:
        server = await lifecycles.load(SERVER, ServerData(task="mnist"))
        await server.create()
    async with Bus.connect(nats.url, Identity(DEV, "flower-client", "c1")) as of_c1:
        await of_c1.publish(FinTrain(task="mnist", client="c1", run="mnist-1", rounds=4))

    lines, records, of_c1_alone = await asyncio.gather(
        fedbus("events", "tail", "--since", "1h", "--count", "3"),
        fedbus("events", "tail", "--since", "1h", "--count", "3", "--json"),
        fedbus("events", "tail", "--since", "1h", "--count", "1", "--client", "c1"),
    )

    assert [line.split()[1] for line in lines.out.splitlines()] == ["code_published", "server", "fin_train"]
    assert lines.out.splitlines()[2].split()[2:] == [
        "flower-client",
        "c1",
        "mnist-1",
        "rounds=4",
        "new_model=True",
    ]
    messages = [json.loads(line) for line in records.out.splitlines()]
    assert [one["word"] for one in messages] == ["code_published", "transition", "fin_train"]
    assert messages[2]["subject"] == "fedbus.dev.client.c1.mnist.fin_train"
    body = {"task": "mnist", "client": "c1", "run": "mnist-1", "rounds": 4, "new_model": True}
    assert messages[2]["body"] == body
    assert of_c1_alone.out.split()[1] == "fin_train"


async def test_tail_prints_a_new_message_at_once(fedbus: FedbusCli, bus: Bus) -> None:
    lines: list[str] = []
    command = (sys.executable, "-m", "fedbus.app.cli.main", "events", "tail", "--json")
    async with ChildProcess("tail", *command, environment=fedbus.environment, output=lines.append) as tail:

        async def is_printed() -> bool:
            await bus.publish(CodePublished(task="mnist", code_version="b" * 40))
            await asyncio.sleep(0.05)
            return bool(lines)

        await eventually(is_printed)
        assert json.loads(lines[0])["word"] == "code_published"
        assert tail.returncode is None


async def test_an_invalid_time_is_a_usage_error(fedbus: FedbusCli) -> None:
    result = await fedbus("events", "tail", "--since", "yesterday")
    assert (result.code, result.err) == (
        2,
        "fedbus: 'yesterday' is not a time. Use for example 90s, 10m, 2h, 1d or 2026-01-31T12:00\n",
    )


async def test_decode_makes_times_and_bytes_readable(fedbus: FedbusCli) -> None:
    body = msgpack.packb(
        {"at": datetime(2026, 3, 14, 12, tzinfo=UTC), "raw": bytes(20), "loss": float("nan"), b"k": [1]},
        datetime=True,
    )
    result = await fedbus("events", "decode", stdin=body)

    assert result.code == 0
    assert result.facts == {
        "at": "2026-03-14T12:00:00+00:00",
        "raw": "<20 bytes: 00000000000000000000000000000000…>",
        "loss": "nan",
        "<1 bytes: 6b>": [1],
    }


@pytest.mark.parametrize("body", [b"hello", b"", b"\xc0" * 300_000])
async def test_an_invalid_body_is_one_line(fedbus: FedbusCli, body: bytes) -> None:
    result = await fedbus("events", "decode", stdin=body)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("fedbus: ")
    assert result.err.count("\n") == 1


async def test_the_catalogue_is_listed(fedbus: FedbusCli) -> None:
    facts = (await fedbus("events", "catalog", "--json")).facts
    (update_ready,) = [one for one in facts if one["word"] == "update_ready"]
    assert update_ready["subject"] == "fedbus.<fed>.cast.<task>.update_ready"
    assert update_ready["heard_by"] == ["client-manager"]


# --- tasks -------------------------------------------------------------------------------------------------


async def test_a_new_task_is_valid_and_each_error_is_one_line(fedbus: FedbusCli, tmp_path: Path) -> None:
    made = await fedbus("task", "new", str(tmp_path / "fresh"), "--json")
    valid = await fedbus("task", "validate", str(tmp_path / "fresh"))
    pyproject = tmp_path / "fresh" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("rounds = ", "ruonds = "))
    broken = await fedbus("task", "validate", str(tmp_path / "fresh"))

    assert (made.code, made.facts["task"]) == (0, "fresh")
    assert valid.code == 0, valid.out + valid.err
    assert broken.code == 1
    assert "ruonds" in broken.out


async def test_a_new_task_can_be_for_another_library(fedbus: FedbusCli, tmp_path: Path) -> None:
    made = await fedbus("task", "new", str(tmp_path / "fresh"), "--library", "functions")
    valid = await fedbus("task", "validate", str(tmp_path / "fresh"))
    unknown = await fedbus("task", "new", str(tmp_path / "other"), "--library", "functins")

    assert (made.code, valid.code) == (0, 0), made.err + valid.out
    assert 'library = "functions"' in (tmp_path / "fresh" / "pyproject.toml").read_text()
    assert unknown.err == (
        "fedbus: there is no template for the library 'functins'; choose one of flower, functions\n"
    )
    assert not (tmp_path / "other").exists()


async def test_a_missing_directory_is_code_5(fedbus: FedbusCli, tmp_path: Path) -> None:
    result = await fedbus("task", "validate", str(tmp_path / "nowhere"))
    assert result.code == 5
    assert "is not a directory. Name the directory with the task's pyproject.toml" in result.err


# --- doctor -------------------------------------------------------------------------------------------------


async def test_doctor_finds_no_problem_on_a_healthy_machine(fedbus: FedbusCli, bus: Bus) -> None:
    result = await fedbus("doctor", "--json")
    findings = {one["what"]: one for one in result.facts}

    assert result.code == 0, result.out
    assert findings["nats-server"]["health"] == "well"
    assert "FEDBUS_dev_EVENTS: 0 messages" in findings["JetStream"]["found"]
    assert findings["clock"]["health"] == "well"


def test_doctor_reports_the_direction_of_a_clock_skew() -> None:
    assert check_clock(2.5).health is Severity.OK
    assert "42 s ahead of the bus (limit 3 s): set the clock of this machine" in str(
        check_clock(42.4).render()
    )
    assert "3600 s behind the bus (limit 3 s)" in str(check_clock(-3600).render())


async def test_doctor_reports_each_problem_with_its_fix(fedbus: FedbusCli, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the directory should be")
    result = await fedbus("doctor", FEDBUS_NATS_URL="nats://127.0.0.1:9")

    assert result.code == 1
    assert "✗ data directory" in result.out
    assert "set FEDBUS_HOME to another" in result.out
    assert "✗ bus" in result.out
    assert result.err == "fedbus: 2 problems found\n"
