"""Calls in the main thread, from an event loop in another one."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from fedbus.agents.common import main_thread as module
from fedbus.agents.common.main_thread import MainThread

WORD: ContextVar[str] = ContextVar("WORD", default="")


@pytest.fixture(autouse=True)
def _long_unwinding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy machine time to end: a test that needs the limit sets a short one."""
    monkeypatch.setattr(module, "UNWIND_S", 60.0)


def serve_while(
    work: Callable[[MainThread], Coroutine[Any, Any, None]], *, on_end: Callable[[], object] = lambda: None
) -> bool:
    """Run *work* on an event loop in another thread, and serve it in this one. Return what `end` returned.

    *on_end* is called when `end` has returned.
    """
    main_thread, is_free, errors = MainThread(), [], list[BaseException]()

    def run() -> None:
        try:
            asyncio.run(work(main_thread))
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            errors.append(error)
        is_free.append(main_thread.end())
        on_end()
        main_thread.release()

    thread = threading.Thread(target=run)
    thread.start()
    main_thread.serve()
    thread.join()
    for error in errors:
        raise error
    return bool(is_free[0])


def test_a_call_runs_in_the_main_thread_with_the_context_of_its_caller() -> None:
    async def work(main_thread: MainThread) -> None:
        WORD.set("hello")
        assert await main_thread.run(threading.current_thread) is threading.main_thread()
        assert await main_thread.run(WORD.get) == "hello"
        assert await main_thread.run(max, [1], default=2) == 1

    assert serve_while(work)


def test_signals_and_event_loops_work_in_a_call() -> None:
    async def work(main_thread: MainThread) -> None:
        assert await main_thread.run(lambda: asyncio.run(asyncio.sleep(0, "slept"))) == "slept"
        assert await main_thread.run(lambda: signal.signal(signal.SIGALRM, signal.SIG_DFL)) is not None

    assert serve_while(work)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_error_of_a_call_is_raised_to_its_caller(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def work(main_thread: MainThread) -> None:
        await main_thread.run(fail)

    with pytest.raises(type(error)):
        serve_while(work)


def test_clean_up_runs_at_the_end_newest_first_whatever_fails() -> None:
    done: list[str] = []

    async def work(main_thread: MainThread) -> None:
        main_thread.at_end(lambda: done.append("first opened"))
        main_thread.at_end(lambda: done.append(str(1 / 0)))
        main_thread.at_end(lambda: done.append("last opened"))

    assert serve_while(work)
    assert done == ["last opened", "first opened"]


def test_a_blocked_main_thread_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNWIND_S", 0.01)
    is_called, unblock, after_end = threading.Event(), threading.Event(), list[bool]()

    def block() -> None:
        is_called.set()
        after_end.append(unblock.wait(60))

    async def work(main_thread: MainThread) -> None:
        call = asyncio.ensure_future(main_thread.run(block))
        await asyncio.to_thread(is_called.wait)
        call.cancel()

    assert not serve_while(work, on_end=unblock.set)
    assert after_end == [True]
