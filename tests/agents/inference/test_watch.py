"""The watch of a new model ends, and its roll-back is recorded, whenever a request for another model comes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.federation import tiny_task
from support.loaded_model import loaded_model

from fedbus.agents.inference.agent import ROLLED_BACK_FILE, SERVED_MODEL_FILE, InferenceAgent, _Watch
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.agents.inference.model_pair import ComparisonRole, ModelPair
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.contracts.client import InferenceEvent, InferStart
from fedbus.contracts.identifiers import ClientId, TaskId


class RecordedTransitions:
    """A lifecycle that records its transitions, each of which takes a moment."""

    def __init__(self) -> None:
        self.events: list[InferenceEvent] = []

    async def transition(self, event: InferenceEvent, *_: Any, **__: Any) -> None:
        await asyncio.sleep(0)
        self.events.append(event)


class WatchedAgent:
    """An inference agent without a bus that watches version 2, which has replaced version 1."""

    def __init__(self, directory: Path) -> None:
        task = tiny_task(directory)
        self.agent = InferenceAgent(
            task,
            ClientId("c1"),
            InferenceServer(),
            load=lambda _: loaded_model().predictor,
            evaluation=OfflineEvaluation(task.table.serving, task.table.capture),
            outbox=None,  # type: ignore[arg-type]
            directory=directory,
            events=EventQueue(),
        )
        self.transitions = RecordedTransitions()
        self.agent._lifecycle = self.transitions  # type: ignore[assignment]
        self.engine = self.agent._server.engine
        old, self.new = loaded_model(1), loaded_model(2)
        self.engine.serve(old)
        self.pair = self.engine.start_comparison(self.new, ComparisonRole.WATCH)
        self._requests = [self._request(TaskId(task.id), model) for model in (old, self.new)]

    def start(self) -> _Watch:
        old, new = self._requests
        return _Watch(self.pair, asyncio.create_task(self.agent._watch_and_roll_back(self.pair, new, old)))

    @staticmethod
    def _request(task: TaskId, model: LoadedModel) -> InferStart:
        return InferStart(task=task, client=ClientId("c1"), model=model.ref, path="/model")


@pytest.fixture
def watched(tmp_path: Path) -> WatchedAgent:
    return WatchedAgent(tmp_path)


def fail(pair: ModelPair) -> None:
    """Let the watch of *pair* fail."""
    pair.errors = 100
    pair.changed.set()


async def test_a_request_during_a_roll_back_does_not_stop_its_record(
    watched: WatchedAgent, tmp_path: Path
) -> None:
    fail(watched.pair)
    watch = watched.start()
    while watched.engine.serving is watched.new:  # noqa: ASYNC110 - a longer pause would miss the moment
        await asyncio.sleep(0)
    await watched.agent._end_watch(watch)
    assert watched.agent._rollback is not None
    await watched.agent._rollback
    assert watched.transitions.events == [InferenceEvent.MODEL_RETURNED]
    assert watched.new.ref.sha256 in (tmp_path / ROLLED_BACK_FILE).read_text()
    assert InferStart.model_validate_json((tmp_path / SERVED_MODEL_FILE).read_text()).model.version == 1


async def test_a_watch_that_ends_before_it_began_leaves_no_comparison(watched: WatchedAgent) -> None:
    await watched.agent._end_watch(watched.start())
    assert watched.engine.pair is None
    assert watched.engine.serving is watched.new
    assert watched.new.fallback is None
