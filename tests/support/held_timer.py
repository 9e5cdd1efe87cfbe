"""Timers of an agent that fire when the test wants it, whatever the speed of the machine."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fedbus.agents.common import asyncio_tools


def hold_timer(monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """Let the timers *name* of all agents fire when the returned event is set, instead of after their delay."""
    may_fire = asyncio.Event()

    async def run_after(delay_s: float, do: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.current_task()
        await (may_fire.wait() if task and task.get_name() == name else asyncio.sleep(delay_s))
        await do()

    monkeypatch.setattr(asyncio_tools, "_run_after", run_after)
    return may_fire
