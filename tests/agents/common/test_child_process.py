"""Real child processes: terminated, ignoring SIGTERM, killed and orphaned."""

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
        await child.wait()

async def main():
    up = asyncio.Event()
    output = lambda line: (print(line, flush=True), up.set())
    child = ChildProcess("deaf", sys.executable, "-c", sys.argv[1], output=output, stop_s=1000)
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


def printed_pid(lines: list[str]) -> int:
    """The process id in *lines*, before or after the output of that process."""
    (pid,) = [int(line) for line in lines if line.isdigit()]
    return pid


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


async def test_leaving_the_block_ends_the_child() -> None:
    async with ChildProcess("sleeper", *python(SLEEPS)) as child:
        assert child.returncode is None

    assert child.returncode == -signal.SIGTERM


async def test_a_child_that_ignores_sigterm_is_killed_after_the_limit() -> None:
    lines: list[str] = []
    async with ChildProcess("deaf", *python(IGNORES_SIGTERM), output=lines.append, stop_s=0.05) as child:
        await eventually(lambda: lines == ["up"])

    assert child.returncode == -signal.SIGKILL


async def test_the_processes_that_a_child_started_end_with_it() -> None:
    lines: list[str] = []
    code = f"{STARTS_ANOTHER}; {SLEEPS}"
    async with ChildProcess("forks", *python(code), output=lines.append) as child:
        await eventually(lambda: len(lines) > 2)
        grandchild = psutil.Process(printed_pid(lines))
        await child.stop()

    await eventually(lambda: not is_running(grandchild))


async def test_processes_that_a_child_left_running_are_killed() -> None:
    lines: list[str] = []
    async with ChildProcess("forks", *python(STARTS_ANOTHER), output=lines.append) as child:
        assert await child.wait() == 0  # although the other process keeps its output open

    await eventually(lambda: not is_running(printed_pid(lines)))


async def test_the_exit_code_of_a_child_is_returned() -> None:
    async with ChildProcess("quick", *python("raise SystemExit(3)")) as child:
        assert await child.wait() == 3


async def test_a_cancelled_block_still_ends_the_child() -> None:
    started: asyncio.Future[ChildProcess] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with ChildProcess("sleeper", *python(SLEEPS)) as child:
            started.set_result(child)
            await child.wait()

    task = asyncio.create_task(hold())
    child = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert child.returncode == -signal.SIGTERM


async def test_a_cancelled_stop_kills_the_child_at_once() -> None:
    lines: list[str] = []
    async with ChildProcess("deaf", *python(IGNORES_SIGTERM), output=lines.append, stop_s=1000) as child:
        await eventually(lambda: lines == ["up"])
        stop = asyncio.create_task(child.stop())
        await asyncio.sleep(0)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
        assert await child.wait() == -signal.SIGKILL


async def test_repeated_cancellation_does_not_leave_the_child_running() -> None:
    lines: list[str] = []
    process = ChildProcess("deaf", *python(IGNORES_SIGTERM), output=lines.append, stop_s=1000)

    async def hold() -> None:
        async with process as child:
            await child.wait()

    task = asyncio.create_task(hold())
    await eventually(lambda: lines == ["up"])
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert process.returncode == -signal.SIGKILL


async def test_a_child_left_to_a_closing_event_loop_is_killed_silently() -> None:
    """For example a handler of nats-py whose connection closes while it builds a model."""
    lines: list[str] = []
    async with ChildProcess(
        "leaves", *python(LEAVES_TO_THE_LOOP, IGNORES_SIGTERM), output=lines.append
    ) as leaves:
        assert await leaves.wait() == 0

    assert lines == ["up", str(-signal.SIGKILL.value)]


@pytest.mark.parametrize("child", [WATCHES, WATCHES_IGNORING_SIGTERM], ids=["default", "ignores SIGTERM"])
async def test_a_child_ends_when_its_parent_is_killed(child: str) -> None:
    lines: list[str] = []
    async with ChildProcess("parent", *python(PARENT, child), output=lines.append) as parent:
        await eventually(lambda: len(lines) == 2)
        process = psutil.Process(printed_pid(lines))
        assert is_running(process)
        os.kill(parent.pid, signal.SIGKILL)
        await eventually(lambda: not is_running(process))


async def test_a_grandchild_does_not_inherit_the_lifeline() -> None:
    lines: list[str] = []
    code = (
        "from fedbus.agents.common.child_process import exit_when_parent_dies; "
        "import subprocess; exit_when_parent_dies(); "
        "print(subprocess.run(['cat'], capture_output=True).returncode, flush=True)"
    )
    async with ChildProcess("child", *python(code), output=lines.append) as child:
        assert await child.wait() == 0

    assert lines == ["0"]


async def test_output_goes_to_a_file_whose_tail_has_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    async with ChildProcess("fails", *python("print('one'); raise SystemExit('two')"), output=log) as child:
        assert await child.wait() == 1

    assert child.log_tail() == "one | two"


async def test_an_answer_is_separate_from_the_output(tmp_path: Path) -> None:
    code = "from fedbus.agents.common.child_process import exit_with_reason; n = exit_with_reason('no model'); print('{}'); raise SystemExit(n)"  # noqa: E501
    async with ChildProcess("builder", *python(code), output=tmp_path / "child.log") as child:
        await child.wait()

    assert child.answer == "no model"
    assert child.describe_exit() == "ended with code 1: no model"
    assert "no model" in (tmp_path / "child.log").read_text(), "the log has the reason too"


async def test_the_answer_of_a_killed_child_is_read() -> None:
    lines: list[str] = []
    code = f"from fedbus.agents.common.child_process import write_answer; write_answer('so far'); {IGNORES_SIGTERM}"
    async with ChildProcess("deaf", *python(code), output=lines.append, stop_s=0.05) as child:
        await eventually(lambda: lines == ["up"])

    assert (child.answer, child.returncode) == ("so far", -signal.SIGKILL)


async def test_an_answer_is_read_up_to_its_limit() -> None:
    code = "from fedbus.agents.common.child_process import write_answer; write_answer('x' * 1_000_000)"
    async with ChildProcess("talker", *python(code)) as child:
        await child.wait()

    assert child.answer == "x" * MAX_ANSWER_BYTES


async def test_a_child_without_an_answer_is_described_by_its_log(tmp_path: Path) -> None:
    async with ChildProcess("falls", *python("raise SystemExit('two')"), output=tmp_path / "log") as child:
        await child.wait()

    assert (child.answer, child.describe_exit()) == ("", "ended with code 1: two")


async def test_a_line_that_is_too_long_is_split() -> None:
    lines: list[str] = []
    async with ChildProcess("talker", *python("print('x' * 300_000)"), output=lines.append) as child:
        await child.wait()

    assert "".join(lines) == "x" * 300_000
    assert all(len(line) <= 128 * 1024 for line in lines)


async def test_a_child_is_in_the_trace_of_its_parent() -> None:
    lines: list[str] = []
    code = (
        "from fedbus.agents.common.child_process import parent_trace; from opentelemetry import trace; "
        "print(format(trace.get_current_span(parent_trace()).get_span_context().trace_id, '032x'))"
    )
    with TracerProvider().get_tracer("test").start_as_current_span("a run") as span:
        async with ChildProcess("child", *python(code), output=lines.append) as child:
            await child.wait()

    assert lines == [format(span.get_span_context().trace_id, "032x")]


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(ChildNotStarted, match=r"cannot start trainer: .*no-such-program"):
        async with ChildProcess("trainer", "/no-such-program"):
            pytest.fail("it started")


def test_a_module_runs_in_this_python() -> None:
    assert module_command("fedbus.x", "a") == (sys.executable, "-m", "fedbus.x", "a")


def test_an_exit_is_described_by_code_or_signal() -> None:
    assert describe_exit(1) == "ended with code 1"
    assert describe_exit(-signal.SIGKILL) == "was killed (SIGKILL, possibly out of memory)"


def test_a_missing_log_has_an_empty_tail(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "nothing") == ""
