"""A federation in separate processes without a reachable OpenTelemetry collector."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.otlp_collector import closed_address, unresponsive_collector
from support.process_federation import run_process_federation


@pytest.mark.slow
@pytest.mark.parametrize("collector", [closed_address, unresponsive_collector])
async def test_a_run_finishes_without_a_reachable_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Callable[[], AbstractContextManager[str]]
) -> None:
    with collector() as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        async with run_process_federation(tmp_path) as site:
            run = await site.start_run(rounds=1)
            await site.wait_until(lambda: site.has_ended(run))

    assert site.run_facts(run).model is not None
    assert site.stack.restarts == {}
