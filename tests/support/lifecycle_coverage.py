"""A check of the whole session: the tests of the agents have taken every transition of every lifecycle table.

Each test with a federation records the transitions that its agents took (see `support.federation`), and each test of
the scheduler's machine those that it decided (see `support.scheduler_machine`). The records of all xdist workers are
merged when the session ends, so no test depends on another, and the order does not matter. The check runs where every
test of the agents was selected and nothing failed.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from fedbus.contracts.transition import LIFECYCLES

TransitionKey = tuple[str, str, str, str]
"""The kind of the lifecycle, the source state, the event and the target state."""

AGENTS: Final = Path(__file__).parents[1] / "agents"
OBSERVED: Final[set[TransitionKey]] = set()
"""The transitions that this process has observed."""
COVERED_ELSEWHERE: Final[frozenset[TransitionKey]] = frozenset()
"""Transitions that no test of an agent takes, each with a comment that names the test that does."""


def all_transitions() -> set[TransitionKey]:
    return {
        (kind, str(arrow.source), str(arrow.event), str(arrow.target))
        for kind, lifecycle in LIFECYCLES.items()
        for arrow in lifecycle
    }


class LifecycleCoverage:
    """The plugin: one object in each worker, and one in the process that the user started."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._observed: set[TransitionKey] = OBSERVED
        self._is_complete = False
        self._missing: set[TransitionKey] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items and not session.config.option.collectonly:  # the xdist controller collects nothing
            self._is_complete = has_all_tests(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Merge the observations of an xdist worker."""
        output = getattr(node, "workeroutput", {})
        self._is_complete = output.get("agents_complete", False)
        self._observed |= {tuple(key) for key in output.get("observed_transitions", ())}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if (output := getattr(self._config, "workeroutput", None)) is not None:
            output["agents_complete"] = self._is_complete
            # xdist serializes plain strings only, no enum members
            output["observed_transitions"] = sorted(tuple(map(str, key)) for key in self._observed)
        elif self._is_complete and exitstatus == pytest.ExitCode.OK:
            self._missing = all_transitions() - self._observed - COVERED_ELSEWHERE
            if self._missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._missing:
            terminalreporter.section("lifecycle coverage", red=True, bold=True)
            for kind, source, event, target in sorted(self._missing):
                terminalreporter.line(f"no test takes {kind}: {source or '•'} –{event}→ {target}")


def has_all_tests(items: Iterable[pytest.Item]) -> bool:
    """Whether *items* has every test function of every file in `tests/agents`."""
    selected: dict[Path, set[str]] = defaultdict(set)
    defined: dict[Path, set[str]] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            selected[item.path].add(item.originalname)
            defined[item.path] = {name for name in vars(item.module) if name.startswith("test_")}
    files = AGENTS.rglob("test_*.py")
    return all(path in defined and defined[path] <= selected[path] for path in files)
