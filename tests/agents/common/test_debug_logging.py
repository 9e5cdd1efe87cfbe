"""Debug logging of method calls."""

import logging

import pytest
import structlog
from structlog.testing import capture_logs

from fedbus.agents.common.debug_logging import LOGGER, log_method_calls


@log_method_calls
class TracedCook:
    async def cook(self, what: str) -> str:
        return self._salted(what)

    def _salted(self, what: str) -> str:
        if what == "ice":
            raise ValueError("no salt on ice")
        return f"salted {what}"


@pytest.fixture
def debug_logging() -> None:
    structlog.reset_defaults()
    logging.getLogger(LOGGER).setLevel(logging.DEBUG)


@pytest.fixture(autouse=True)
def restore_log_level() -> object:
    yield
    logging.getLogger(LOGGER).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("debug_logging")
async def test_each_call_is_logged_at_entry_and_exit() -> None:
    with capture_logs() as lines:
        assert await TracedCook().cook("fish") == "salted fish"

    assert [line["event"] for line in lines] == [
        "→ TracedCook.cook",
        "→ TracedCook._salted",
        "← TracedCook._salted",
        "← TracedCook.cook",
    ]
    assert lines[0]["arguments"] == ["str"], "only types are logged, because values may be private"


@pytest.mark.usefixtures("debug_logging")
async def test_an_exception_is_logged_as_the_outcome() -> None:
    with capture_logs() as lines, pytest.raises(ValueError, match="no salt"):
        await TracedCook().cook("ice")

    assert [line["outcome"] for line in lines if line["event"].startswith("←")] == [
        "ValueError",
        "ValueError",
    ]


async def test_nothing_is_logged_above_debug() -> None:
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    with capture_logs() as lines:
        await TracedCook().cook("fish")

    assert lines == []
