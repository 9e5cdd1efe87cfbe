"""Child processes: real ones, asked, deaf, killed and orphaned."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from opentelemetry.sdk.trace import TracerProvider
from support import eventually
from support.processes import is_running

from fedbus.agents.common.child_process import (
    MAX_ANSWER_BYTES,
    ChildNotStarted,
    ChildProcess,
    describe_exit,
    log_tail,
    module_command,
)

SLEEPS = "import time; print('up', flush=True); time.sleep(1000)"
IGNORES_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
STARTS_ANOTHER = (
    "import subprocess, sys; "
    f"print(subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}]).pid, flush=True)"
)
WATCH = (
    "from fedbus.agents.common.child_process import exit_when_parent_dies; exit_when_parent_dies(grace_s=0.1)"
)
WATCHES = f"{WATCH}; {SLEEPS}"
WATCHES_IGNORING_SIGTERM = f"{WATCH}; {IGNORES_SIGTERM}"
LEAVES_TO_THE_LOOP = """
import asyncio, sys
from fedbus.agents.common.child_process import ChildProcess

async def hold(child):
    async with child:
        await child.ended()

async def main():
    up = asyncio.Event()
    say = lambda line: (print(line, flush=True), up.set())
    child = ChildProcess("deaf", sys.executable, "-c", sys.argv[1], output=say, stop_s=1000)
    left = asyncio.create_task(hold(child))
    await up.wait()
    left.cancel()
    await asyncio.sleep(0)
    return child

print(asyncio.run(main()).returncode)
"""
PARENT = """
import asyncio, sys
from fedbus.agents.common.child_process import ChildProcess

async def main():
    async with ChildProcess("child", sys.executable, "-c", sys.argv[1], output=print) as child:
        print(child.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


async def test_leaving_the_block_ends_the_child() -> None:
    async with ChildProcess("sleeper", *python(SLEEPS)) as child:
        assert child.returncode is None

    assert child.returncode == -signal.SIGTERM


async def test_a_deaf_child_is_killed_after_the_bound() -> None:
    said: list[str] = []
    async with ChildProcess("deaf", *python(IGNORES_SIGTERM), output=said.append, stop_s=0.05) as child:
        await eventually(lambda: said == ["up"])

    assert child.returncode == -signal.SIGKILL


async def test_what_a_child_started_ends_with_it() -> None:
    said: list[str] = []
    code = f"{STARTS_ANOTHER}; {SLEEPS}"
    async with ChildProcess("forks", *python(code), output=said.append) as child:
        await eventually(lambda: len(said) > 2)
        grandchild = psutil.Process(int(said[0]))
        await child.stop()

    await eventually(lambda: not is_running(grandchild))


async def test_a_child_that_ends_and_leaves_something_running_is_cleared_away() -> None:
    said: list[str] = []
    async with ChildProcess("forks", *python(STARTS_ANOTHER), output=said.append) as child:
        assert await child.ended() == 0  # although the other one holds its output open

    await eventually(lambda: not is_running(int(said[0])))


async def test_a_child_that_ends_by_itself_is_noticed_with_its_code() -> None:
    async with ChildProcess("quick", *python("raise SystemExit(3)")) as child:
        assert await child.ended() == 3


async def test_a_cancelled_block_still_ends_the_child() -> None:
    started: asyncio.Future[ChildProcess] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with ChildProcess("sleeper", *python(SLEEPS)) as child:
            started.set_result(child)
            await child.ended()

    task = asyncio.create_task(hold())
    child = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert child.returncode == -signal.SIGTERM


async def test_cancelled_while_it_waits_for_a_deaf_child_it_kills_at_once() -> None:
    said: list[str] = []
    async with ChildProcess("deaf", *python(IGNORES_SIGTERM), output=said.append, stop_s=1000) as child:
        await eventually(lambda: said == ["up"])
        stop = asyncio.create_task(child.stop())
        await asyncio.sleep(0)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
        assert await child.ended() == -signal.SIGKILL


async def test_however_often_it_is_cancelled_the_child_is_over_when_its_block_is() -> None:
    said: list[str] = []
    deaf = ChildProcess("deaf", *python(IGNORES_SIGTERM), output=said.append, stop_s=1000)

    async def hold() -> None:
        async with deaf as child:
            await child.ended()

    task = asyncio.create_task(hold())
    await eventually(lambda: said == ["up"])
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert deaf.returncode == -signal.SIGKILL


async def test_a_child_that_is_left_to_a_loop_that_closes_leaves_no_complaint() -> None:
    """As a handler of nats-py is, whose connection goes while it builds a model."""
    said: list[str] = []
    async with ChildProcess(
        "leaves", *python(LEAVES_TO_THE_LOOP, IGNORES_SIGTERM), output=said.append
    ) as leaves:
        assert await leaves.ended() == 0

    assert said == ["up", str(-signal.SIGKILL.value)]


@pytest.mark.parametrize("child", [WATCHES, WATCHES_IGNORING_SIGTERM], ids=["hearing", "deaf"])
async def test_a_child_ends_when_its_parent_is_killed(child: str) -> None:
    said: list[str] = []
    async with ChildProcess("parent", *python(PARENT, child), output=said.append) as parent:
        await eventually(lambda: "up" in said)
        process = psutil.Process(next(int(line) for line in said if line.isdigit()))
        assert is_running(process)
        os.kill(parent.pid, signal.SIGKILL)
        await eventually(lambda: not is_running(process))


async def test_what_a_watched_child_starts_does_not_share_the_lifeline() -> None:
    said: list[str] = []
    code = (
        "from fedbus.agents.common.child_process import exit_when_parent_dies; "
        "import subprocess; exit_when_parent_dies(); "
        "print(subprocess.run(['cat'], capture_output=True).returncode, flush=True)"
    )
    async with ChildProcess("child", *python(code), output=said.append) as child:
        assert await child.ended() == 0

    assert said == ["0"]


async def test_output_goes_to_a_file_whose_end_tells_why(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    async with ChildProcess("fails", *python("print('one'); raise SystemExit('two')"), output=log) as child:
        assert await child.ended() == 1

    assert child.last_words() == "one | two"


async def test_an_answer_is_its_own_whatever_the_child_prints_after_it(tmp_path: Path) -> None:
    code = "from fedbus.agents.common.child_process import exit_with_reason; n = exit_with_reason('no model'); print('{}'); raise SystemExit(n)"  # noqa: E501
    async with ChildProcess("builder", *python(code), output=tmp_path / "child.log") as child:
        await child.ended()

    assert child.answer == "no model"
    assert child.describe_exit() == "ended with code 1: no model"
    assert "no model" in (tmp_path / "child.log").read_text(), "for whoever looks there"


async def test_an_answer_is_heard_of_a_child_that_was_stopped_or_killed() -> None:
    said: list[str] = []
    code = f"from fedbus.agents.common.child_process import write_answer; write_answer('so far'); {IGNORES_SIGTERM}"
    async with ChildProcess("deaf", *python(code), output=said.append, stop_s=0.05) as child:
        await eventually(lambda: said == ["up"])

    assert (child.answer, child.returncode) == ("so far", -signal.SIGKILL)


async def test_an_answer_is_taken_up_to_its_bound() -> None:
    code = "from fedbus.agents.common.child_process import write_answer; write_answer('x' * 1_000_000)"
    async with ChildProcess("talker", *python(code)) as child:
        await child.ended()

    assert child.answer == "x" * MAX_ANSWER_BYTES


async def test_who_died_without_a_word_is_told_of_by_its_end_and_its_log(tmp_path: Path) -> None:
    async with ChildProcess("falls", *python("raise SystemExit('two')"), output=tmp_path / "log") as child:
        await child.ended()

    assert (child.answer, child.describe_exit()) == ("", "ended with code 1: two")


async def test_a_line_without_end_comes_in_pieces() -> None:
    said: list[str] = []
    async with ChildProcess("talker", *python("print('x' * 300_000)"), output=said.append) as child:
        await child.ended()

    assert "".join(said) == "x" * 300_000
    assert all(len(line) <= 128 * 1024 for line in said)


async def test_a_child_is_in_the_trace_of_its_parent() -> None:
    said: list[str] = []
    code = (
        "from fedbus.agents.common.child_process import parent_trace; from opentelemetry import trace; "
        "print(format(trace.get_current_span(parent_trace()).get_span_context().trace_id, '032x'))"
    )
    with TracerProvider().get_tracer("test").start_as_current_span("a run") as span:
        async with ChildProcess("child", *python(code), output=said.append) as child:
            await child.ended()

    assert said == [format(span.get_span_context().trace_id, "032x")]


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(ChildNotStarted, match=r"cannot start trainer: .*no-such-program"):
        async with ChildProcess("trainer", "/no-such-program"):
            pytest.fail("it started")


def test_a_module_runs_in_this_python() -> None:
    assert module_command("fedbus.x", "a") == (sys.executable, "-m", "fedbus.x", "a")


def test_an_end_in_words() -> None:
    assert describe_exit(1) == "ended with code 1"
    assert describe_exit(-signal.SIGKILL) == "was killed (SIGKILL, perhaps for want of memory)"


def test_there_are_no_last_words_where_there_is_no_log(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "nothing") == ""
