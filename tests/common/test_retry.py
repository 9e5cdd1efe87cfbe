"""Retry with backoff: how long the pauses are, when they end, which errors are raised."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.common.retry import MAX_PAUSE_S, RetryBackoff, backoff_s, retry


class FailingCall:
    """A call that fails with *error* so many times, and then answers."""

    def __init__(self, times: int, error: type[Exception] = ConnectionError) -> None:
        self.left = times
        self.error = error

    async def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the code requests; none of them takes any time."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    return pauses


@given(st.integers(0, 10_000), st.floats(0.001, 10.0), st.floats(0.001, 100.0))
def test_a_pause_is_between_half_and_all_of_its_length(attempt: int, first_s: float, max_s: float) -> None:
    longest = min(max_s, first_s * 2.0 ** min(attempt, 30))
    assert 0.5 * longest <= backoff_s(attempt, first_s=first_s, max_s=max_s) <= longest


async def test_pauses_grow_until_success(pauses: list[float]) -> None:
    assert await retry(FailingCall(9), on=ConnectionError) == "answer"
    assert len(pauses) == 9
    assert pauses[:5] == sorted(pauses[:5])
    assert 0.5 * MAX_PAUSE_S <= pauses[-1] <= MAX_PAUSE_S


async def test_another_error_is_raised_at_once(pauses: list[float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        await retry(FailingCall(1, ValueError), on=(ConnectionError, TimeoutError))
    assert pauses == []


async def test_each_failure_is_reported_with_those_before_it() -> None:
    reported: list[tuple[str, int]] = []
    await retry(
        FailingCall(3),
        on=ConnectionError,
        on_failure=lambda error, before: reported.append((type(error).__name__, before)),
    )
    assert reported == [("ConnectionError", 0), ("ConnectionError", 1), ("ConnectionError", 2)]


async def test_a_report_may_give_up(pauses: list[float]) -> None:
    def give_up(error: Exception, before: int) -> None:
        if before == 2:
            raise LookupError from error

    with pytest.raises(LookupError):
        await retry(FailingCall(9), on=ConnectionError, on_failure=give_up)
    assert len(pauses) == 2


async def test_an_exhausted_limit_raises_the_error(pauses: list[float]) -> None:
    with pytest.raises(ConnectionError):
        await retry(FailingCall(9), on=ConnectionError, backoff=RetryBackoff(limit_s=0.0))
    assert pauses == []


async def test_a_reset_begins_with_the_shortest_pause(pauses: list[float]) -> None:
    backoff = RetryBackoff(first_s=1.0, max_s=60.0)
    for _ in range(4):
        await backoff.pause()
    backoff.reset()
    assert backoff.attempts == 0
    await backoff.pause()
    assert pauses[-1] <= 1.0 < pauses[-2]


async def test_a_stop_ends_a_pause() -> None:
    stop = asyncio.Event()
    pause = asyncio.create_task(RetryBackoff(first_s=60.0, max_s=60.0).pause(stop))
    await asyncio.wait([pause], timeout=0.01)
    assert not pause.done()
    stop.set()
    await pause


async def test_a_pause_with_a_stop_that_is_not_set_ends_by_itself() -> None:
    await RetryBackoff(first_s=0.01).pause(asyncio.Event())
