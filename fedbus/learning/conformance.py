"""The suite that each training library passes.

    # test_my_library.py
    from fedbus.learning.conformance import LibrarySuite

    class TestMyLibrary(LibrarySuite):
        library = "my-library"

        def write_app(self, directory, package):
            ...

A library passes if pytest passes this class. The suite runs sessions of the library over a bus in memory: the server
side in the main thread, each client in a thread of its own. `write_app` writes one small app, whose model is one
array ``w`` of three float32 zeros. Its clients know their number, the partition id:

- *train* adds ``number + 1`` to ``w``. It trains on 30 samples if the number is 0, else on 10. Its metrics are
  ``loss``, which is ``1 / (number + 1)``, and ``count``, the number of messages it has trained on in this run.
  Client `FAILS` raises ``RuntimeError("no data")``.
- *evaluate* reports the metric ``loss``, which is ``10 - w.mean()``.
- the server averages by samples, for as many rounds as the plan says.

So a round of the clients 0 and 1 adds 1.25. This module needs pytest.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final
from uuid import uuid4

import numpy as np
import pytest

from fedbus.contracts.client import FailTrain
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.task.aggregation import AggregationMode
from fedbus.learning.library import (
    BadTask,
    ClientJob,
    ClientResponse,
    ClientSession,
    IncomingMessage,
    MessengerClosed,
    ModeUnsupported,
    ServerJob,
)
from fedbus.learning.payload import Payload
from fedbus.learning.suite_federation import SuiteFederation, SuiteRun, model, train_in_process
from fedbus.learning.task_model import first_arrays

FAILS: Final = 2
"""The number of the client whose training raises."""

MEAN_STEP: Final = 1.25
"""The sum that a round of the clients 0 and 1 adds to each element of the model."""

STOP_S: Final = 60.0
"""The time within which a run that is stopped ends."""

SAMPLES: Final = {"c0": 30, "c1": 10}

__all__ = ["FAILS", "LibrarySuite"]


class LibrarySuite(ABC):
    """The behaviour that fedbus needs of a training library, as tests.

    Subclass it in a test module, with a name that begins with ``Test``.
    """

    library: ClassVar[str]
    """The name of the library's entry point."""
    plan: ClassVar[Mapping[str, float]] = {}
    """Values of the run plan, for a library that needs more time than the suite gives it."""

    @abstractmethod
    def write_app(self, directory: Path, package: str) -> None:
        """Write the app of the suite, as this module describes it, to *directory*.

        Write a ``pyproject.toml``, with ``library`` in ``[tool.fedbus]``, and the code as the Python package *package*,
        whose name is another one in each test.
        """

    @pytest.fixture
    def loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        """An event loop in another thread."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="event loop", daemon=True)
        thread.start()
        yield loop
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    @pytest.fixture
    def run(self, tmp_path: Path, loop: asyncio.AbstractEventLoop) -> SuiteRun:
        """The task of the suite, whose runs the tests open."""
        package = f"suite_{uuid4().hex[:8]}"
        self.write_app(tmp_path, package)
        return SuiteRun(self.library, self.plan, tmp_path, package, loop)

    # --- task side --------------------------------------------------------------------------------

    def test_the_app_is_read_without_importing_it(self, run: SuiteRun) -> None:
        declared = run.library.read_app(
            tomllib.loads((run.directory / "pyproject.toml").read_text()), run.directory
        )
        assert declared.problems == ()
        assert declared.references
        assert not any(name.startswith(run.package) for name in sys.modules)

    def test_an_app_that_is_not_declared_is_a_problem(self, run: SuiteRun) -> None:
        declared = run.library.read_app({}, run.directory)
        assert declared.problems
        assert all(problem.what and problem.advice for problem in declared.problems)

    def test_a_valid_app_passes_the_check(self, run: SuiteRun) -> None:
        run.library.check(run.task, server_side=True)

    def test_an_app_that_cannot_be_imported_fails_the_check_with_its_line(self, run: SuiteRun) -> None:
        task = run.task
        for file in (run.directory / run.package).rglob("*.py"):
            file.write_text("\nimport no_such_module_of_the_suite\n")
        with pytest.raises(BadTask, match=r"no_such_module_of_the_suite.*\.py:2"):
            run.library.check(task, server_side=True)
        with pytest.raises(BadTask, match="no_such_module_of_the_suite"):
            run.library.open_client(ClientJob(task=task, client="c0", run="suite-1"))
        with pytest.raises(BadTask, match="no_such_module_of_the_suite"):
            run.library.open_server(ServerJob(task=task, run="suite-1", plan=RunPlan(), model=model()))

    def test_the_first_model_is_the_one_that_the_app_declares(self, run: SuiteRun) -> None:
        arrays = first_arrays(run.task)
        if arrays is None:
            return  # the first run begins with what the app itself begins with
        assert list(arrays) == ["w"]
        np.testing.assert_array_equal(arrays["w"], model()["w"])
        assert arrays["w"].dtype == np.float32

    # --- a run ------------------------------------------------------------------------------------

    def test_a_run_trains_from_the_stored_model_for_the_planned_rounds(self, run: SuiteRun) -> None:
        with run.open(rounds=2) as federation:
            federation.add_client(0)
            federation.add_client(1)
            final = federation.train(model(5.0))

        assert final is not None
        np.testing.assert_allclose(final["w"], 5 + 2 * MEAN_STEP, rtol=1e-5)
        assert final["w"].dtype == np.float32
        assert [result.round for result in federation.results] == [1, 2]
        by_round = {result.round: arrays for result, arrays in federation.rounds}
        np.testing.assert_allclose(by_round[1]["w"], 5 + MEAN_STEP, rtol=1e-5)
        np.testing.assert_allclose(by_round[2]["w"], 5 + 2 * MEAN_STEP, rtol=1e-5)

    def test_a_run_without_a_stored_model_begins_with_the_apps_own(self, run: SuiteRun) -> None:
        with run.open(rounds=1) as federation:
            federation.add_client(0)
            federation.add_client(1)
            final = federation.train(first_arrays(run.task) or {})
        assert final is not None
        np.testing.assert_allclose(next(iter(final.values())), MEAN_STEP, rtol=1e-5)

    @pytest.mark.parametrize(
        "mode", [AggregationMode.DEADLINE, AggregationMode.BUFFERED, AggregationMode.ASYNC]
    )
    def test_a_run_has_its_aggregation_mode_or_is_refused(self, run: SuiteRun, mode: AggregationMode) -> None:
        """A library without modes raises ModeUnsupported: a run never aggregates in another way than it reports."""
        with run.open(rounds=3, aggregation={"mode": mode.value, "buffer-size": 2}) as federation:
            federation.add_client(0)
            federation.add_client(1)
            try:
                final = federation.train(model(5.0))
            except ModeUnsupported:
                return
        assert final is not None
        rounds = [result for result in federation.results if result.round]
        assert [(result.round, result.mode) for result in rounds] == [(n, mode) for n in (1, 2, 3)]
        if mode is AggregationMode.DEADLINE:  # both clients are in time
            np.testing.assert_allclose(final["w"], 5 + 3 * MEAN_STEP, rtol=1e-5)
        else:  # the order of arrival decides what each update counts
            assert np.isfinite(final["w"]).all()
            assert (final["w"] > 5.0).all()

    def test_a_round_reports_metrics_samples_and_times(self, run: SuiteRun) -> None:
        with run.open(rounds=1) as federation:
            federation.add_client(0)
            federation.add_client(1)
            start = time.monotonic()
            federation.train(model())
            duration_s = time.monotonic() - start

        (result,) = federation.results
        assert result.participants == SAMPLES
        assert result.failures == {}
        assert result.metrics["train_loss"] == pytest.approx((30 * 1 + 10 * 0.5) / 40)
        assert result.metrics["eval_loss"] == pytest.approx(10 - MEAN_STEP, rel=1e-5)
        assert result.figures["c0"]["train_loss"] == 1.0
        assert result.figures["c1"]["train_loss"] == 0.5
        assert result.figures["c1"]["eval_loss"] == pytest.approx(10 - MEAN_STEP, rel=1e-5)
        assert set(result.train_s) == set(SAMPLES)
        assert all(0 <= train_s <= duration_s for train_s in result.train_s.values())

    def test_a_client_keeps_its_state_between_rounds(self, run: SuiteRun) -> None:
        with run.open(rounds=3) as federation:
            federation.add_client(0)
            federation.add_client(1)
            federation.train(model())
        assert [result.figures["c0"]["train_count"] for result in federation.results] == [1, 2, 3]

    def test_the_model_of_a_round_is_offered_once(self, run: SuiteRun) -> None:
        with run.open(rounds=1) as federation:
            for number in (0, 1, 3):
                federation.add_client(number)
            federation.train(model())
        assert federation.bus.blobs.offered <= 2 + 3  # to train, to evaluate, and one reply of each client
        assert federation.bus.blobs.released <= federation.bus.blobs.offered

    # --- clients that fail ------------------------------------------------------------------------

    def test_a_client_whose_code_raises_fails_alone(self, run: SuiteRun) -> None:
        with run.open(rounds=2) as federation:
            for number in (0, 1, FAILS):
                federation.add_client(number)
            final = federation.train(model())

        assert final is not None
        np.testing.assert_allclose(final["w"], 2 * MEAN_STEP, rtol=1e-5)
        for result in federation.results:
            assert result.participants == SAMPLES
            assert "no data" in result.failures[f"c{FAILS}"]
            assert "\n" not in result.failures[f"c{FAILS}"]

    def test_a_client_that_leaves_ends_the_wait_for_its_reply(self, run: SuiteRun) -> None:
        with run.open(rounds=1, round_s=300.0) as federation:
            federation.add_client(0)
            federation.add_client(1)
            federation.add_client(3, is_silent=True)
            leave, device = _leave(federation, "c3"), federation.devices["c3"]
            federation.call_when(
                lambda: device.received_messages, lambda: federation.messenger.deliver(leave)
            )
            final = federation.train(model())

        assert final is not None
        np.testing.assert_allclose(final["w"], MEAN_STEP, rtol=1e-5)
        (result,) = federation.results
        assert result.participants == SAMPLES
        assert "the battery is low" in result.failures["c3"]

    def test_a_round_continues_without_a_client_at_its_deadline(self, run: SuiteRun) -> None:
        with run.open(rounds=1, round_s=300.0) as federation:
            federation.add_client(0)
            federation.add_client(1)
            federation.add_client(3, is_silent=True)
            federation.expire_messages_to("c3")
            final = federation.train(model())

        assert final is not None
        np.testing.assert_allclose(final["w"], MEAN_STEP, rtol=1e-5)
        assert federation.results[0].participants == SAMPLES

    def test_a_reply_that_cannot_be_decoded_is_the_failure_of_its_client(self, run: SuiteRun) -> None:
        with run.open(rounds=1) as federation:
            federation.add_client(0)
            federation.add_client(1)
            federation.add_client(3, wrap=_Garbles)
            final = federation.train(model())

        assert final is not None
        np.testing.assert_allclose(final["w"], MEAN_STEP, rtol=1e-5)
        (result,) = federation.results
        assert result.participants == SAMPLES
        assert result.failures["c3"]

    def test_a_message_that_cannot_be_decoded_is_an_error_reply(self, run: SuiteRun) -> None:
        session = run.library.open_client(ClientJob(task=run.task, client="c0", run="suite-1"))
        response = session.handle(IncomingMessage(message_id="m1", kind="train", data=b"garbage"))
        session.close()
        assert response.error is not None
        assert response.error.reason

    # --- stop and restart -------------------------------------------------------------------------

    def test_a_stopped_run_ends_at_once(self, run: SuiteRun) -> None:
        with run.open(rounds=2, round_s=300.0) as federation:
            federation.add_client(0)
            federation.add_client(1, is_silent=True)
            device, blobs = federation.devices["c1"], federation.bus.blobs
            federation.call_when(
                lambda: device.received_messages and (blobs.fetched or not blobs.offered),
                lambda: federation.messenger.close("the run was cancelled"),
            )
            timer = threading.Timer(STOP_S, federation.lose_client, ("c1",))
            timer.start()
            with pytest.raises(MessengerClosed, match="the run was cancelled"):
                federation.train(model())
            assert timer.is_alive(), f"the run did not end within {STOP_S:g} s"
            timer.cancel()

    def test_a_lost_run_resumes_in_its_round(self, run: SuiteRun) -> None:
        with run.open(rounds=4) as federation:
            federation.add_client(0)
            federation.add_client(1)

            def stop_after_two_rounds(result: RoundResult) -> None:
                if result.round == 2:
                    raise _ProcessKilled

            with suppress(_ProcessKilled):
                federation.train(model(), on_round=stop_after_two_rounds)
            checkpoint = federation.rounds[-1][1]
        with run.open(rounds=4) as federation:
            federation.add_client(0)
            federation.add_client(1)
            final = federation.train(checkpoint, first_round=3)

        assert final is not None
        np.testing.assert_allclose(final["w"], 4 * MEAN_STEP, rtol=1e-5)
        assert [result.round for result, _ in federation.rounds] == [3, 4]

    def test_a_client_serves_a_server_that_was_started_again(self, run: SuiteRun) -> None:
        with run.open(rounds=1) as federation:
            federation.add_client(0)
            federation.add_client(1)
            federation.train(model())
            final = federation.train(model(1.0))
        assert final is not None
        np.testing.assert_allclose(final["w"], 1 + MEAN_STEP, rtol=1e-5)

    def test_two_tasks_train_at_the_same_time(self, run: SuiteRun, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        self.write_app(other, f"other_{run.package}")
        module = train_in_process.__module__
        program = f"import sys; from {module} import train_in_process; train_in_process(*sys.argv[1:])"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, self.library, str(directory), start],
                stdout=subprocess.PIPE,
                text=True,
            )
            for directory, start in ((run.directory, "0"), (other, "100"))
        ]
        finals = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
        assert finals == [pytest.approx(2 * MEAN_STEP), pytest.approx(100 + 2 * MEAN_STEP)]


class _ProcessKilled(BaseException):
    """Stands for the end of the process between two rounds."""


@dataclass
class _Garbles:
    """A session whose replies cannot be decoded."""

    session: ClientSession

    def handle(self, message: IncomingMessage) -> ClientResponse:
        self.session.handle(message)
        return ClientResponse(payload=Payload.pack([b"garbage"]))

    def close(self) -> None:
        self.session.close()


def _leave(federation: SuiteFederation, client: str) -> FailTrain:
    return FailTrain(task=federation.task.id, client=client, run=federation.run, reason="the battery is low")
