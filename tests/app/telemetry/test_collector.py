"""Export to a collector, also to one that is slow, broken, silent or unavailable."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from support import eventually
from support.cli import clean_environment, run_python_async
from support.otlp_collector import run_collector, unresponsive_collector
from support.ports import free_port

from fedbus.app.local.nats_server import embedded_nats
from fedbus.app.telemetry import FLUSH_S, span_reader
from fedbus.app.telemetry.collector import FAILING_FLUSH_S
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.telemetry import MAX_SERIES, METRICS

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
LONGEST_S = 60
"""Far above the flush limit, and far below the limit of an exporter without it."""

LOGS_AND_TRACES = """
import logging, structlog
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry
from fedbus.contracts.telemetry import LOOP_LAG, PREDICTION_DURATION, ROUNDS, TRAIN_LOSS, increment, set_gauge, record

with configure_telemetry("fedbus-trainer", client="c1"):
    log = structlog.get_logger("fedbus.test")
    with trace.get_tracer("test").start_as_current_span("predict"):
        record(PREDICTION_DURATION, 0.02, {"fedbus.client": "c1"})
        log.warning("the battery is low", percent=7, where={"a": 1}, event_id="e1")
        logging.getLogger("some.library").error("lost %s", "it")
        try:
            rows = ["patient" + " 4711"]
            1 / 0
        except ZeroDivisionError:
            log.exception("it broke")
    set_gauge(TRAIN_LOSS, 0.25, {"fedbus.client": "c1"})
"""
BREAKS = """
from contextlib import suppress
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry

with configure_telemetry("fedbus-trainer"):
    tracer = trace.get_tracer("test")
    with tracer.start_as_current_span("above"):
        with suppress(ZeroDivisionError), tracer.start_as_current_span("below"):
            1 / 0
"""
LEAVES = """
from opentelemetry._logs import LogRecord, get_logger_provider
from fedbus.app.telemetry.collector import OtlpExport
from fedbus.app.telemetry.tracer import sdk_provider

collector = OtlpExport(sdk_provider({}))
print(collector.flush_s)
get_logger_provider().get_logger("test").emit(LogRecord(body="a line"))
get_logger_provider().force_flush()
print(collector.flush_s)
"""
MANY = """
from fedbus.app.telemetry import configure_telemetry
from fedbus.contracts.telemetry import ROUNDS, increment

with configure_telemetry("fedbus-server"):
    for number in range(500):
        increment(ROUNDS, {"fedbus.task": f"task-{number}"})
"""
BUSY = """
import structlog, time
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry

with configure_telemetry("fedbus-server"):
    tracer, log = trace.get_tracer("test"), structlog.get_logger("fedbus.test")
    for number in range(5000):
        with tracer.start_as_current_span("run • → requested", attributes={"fedbus.run": "digits-1"}):
            pass
        if number % 10 == 0:
            log.info("a line", number=number)
    print("worked")
"""
WATCHES_NATS = """
import asyncio, sys
from fedbus.app.telemetry import configure_telemetry, process_metrics
from fedbus.app.telemetry.process_metrics import measure_process

process_metrics.REQUEST_S = 60.0  # a busy nats-server is not an unavailable one

async def main():
    with measure_process(sys.argv[1]):
        await asyncio.sleep(1.5)

with configure_telemetry("fedbus-server"):
    asyncio.run(main())
"""


async def run_python(home: Path, code: str, *arguments: str, **environment: str) -> tuple[str, str]:
    """Its standard output and standard error; the process must end."""
    variables = clean_environment() | {"FEDBUS_HOME": str(home)} | environment
    result = await run_python_async(code, *arguments, environment=variables, within_s=LONGEST_S)
    return result.out, result.err


async def test_log_lines_arrive_with_trace_data_and_exception(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(tmp_path, LOGS_AND_TRACES, **{ENDPOINT: collector.url})

    (span,) = collector.spans
    lines = {line.body: line for line in collector.log_lines}
    assert set(lines) == {"the battery is low", "lost it", "it broke"}
    ours, broken = lines["the battery is low"], lines["it broke"]
    assert (ours.service, ours.body, ours.trace_id) == ("fedbus-trainer", "the battery is low", span.trace_id)
    assert ours.attributes["percent"] == 7
    assert ours.attributes["event_id"] == "e1"
    assert ours.attributes["where"] == "{'a': 1}"
    assert broken.attributes["exception.type"] == "ZeroDivisionError"
    assert broken.attributes["exception.message"] == "division by zero"
    assert "ZeroDivisionError: division by zero" in str(broken.attributes["exception.stacktrace"])
    assert "patient 4711" not in str(broken.attributes)


async def test_a_span_that_an_exception_ended_has_its_type(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(tmp_path, BREAKS, **{ENDPOINT: collector.url})

    about = {span.name: span.attributes.get("error.type", "") for span in collector.spans}
    assert about == {"below": "ZeroDivisionError", "above": ""}


async def test_metrics_arrive_with_their_unit_and_an_exemplar(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(tmp_path, LOGS_AND_TRACES, **{ENDPOINT: collector.url})

    (span,) = collector.spans
    latency = collector.metrics["fedbus.prediction.duration"]
    assert (latency.unit, latency.series) == ("s", [{"fedbus.client": "c1"}])
    assert latency.exemplars == [span.trace_id]
    assert collector.metrics["fedbus.train.loss"].unit == "1"
    assert {one["fedbus.level"] for one in collector.metrics["fedbus.log.lines"].series} == {
        "warning",
        "error",
    }


async def test_the_series_of_a_metric_are_limited(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(tmp_path, MANY, **{ENDPOINT: collector.url})

    series = collector.metrics["fedbus.rounds"].series
    assert len(series) == MAX_SERIES + 1
    assert [name for one in series for name in one].count("otel.metric.overflow") == 1, "the rest, together"


async def test_each_signal_has_its_own_endpoint_or_none(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(
            tmp_path, LOGS_AND_TRACES, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/v1/traces"
        )

    assert (len(collector.spans), collector.log_lines, collector.metrics) == (1, [], {})


async def test_nats_server_and_the_loop_are_measured(tmp_path: Path) -> None:
    async with (
        embedded_nats(tmp_path / "nats") as nats,
        Bus.connect(nats.url, Identity(FederationId("dev"), "test")) as bus,
        run_collector() as collector,
    ):
        await bus.create_streams()
        often = {ENDPOINT: collector.url, "OTEL_METRIC_EXPORT_INTERVAL": "300"}
        await run_python(tmp_path, WATCHES_NATS, nats.monitor_url, **often)

    of_nats = {name for name in METRICS if name.startswith("fedbus.nats.")}
    assert set(collector.metrics) >= of_nats | {"fedbus.loop.lag"}
    streams = {one["fedbus.stream"] for one in collector.metrics["fedbus.nats.stream.size"].series}
    assert "FEDBUS_dev_LIFE" in streams


async def test_an_unavailable_nats_server_has_no_metrics(tmp_path: Path) -> None:
    async with run_collector() as collector:
        await run_python(tmp_path, WATCHES_NATS, "http://127.0.0.1:9", **{ENDPOINT: collector.url})

    assert not [name for name in collector.metrics if name.startswith("fedbus.nats.")]


# --- collectors as they should not be -----------------------------------------------------------------


def assert_undisturbed(out: str, errors: str, home: Path) -> None:
    """The process did its work, logged few failures, and stored all its spans."""
    assert out == "worked\n"
    lines = [json.loads(line) for line in errors.splitlines()]
    assert len([line for line in lines if line["event"] == "a line"]) == 500
    complaints = [line for line in lines if line["event"] != "a line"]
    assert len(complaints) <= 1, complaints
    assert "Traceback" not in errors
    files = sorted((home / "traces").iterdir())
    assert files
    assert span_reader.list_runs(home / "traces") == ["digits-1"]


async def test_an_absent_collector_disturbs_nothing(tmp_path: Path) -> None:
    assert_undisturbed(*await run_python(tmp_path, BUSY, **{ENDPOINT: "http://127.0.0.1:9"}), tmp_path)


async def test_a_black_hole_disturbs_nothing(tmp_path: Path) -> None:
    with unresponsive_collector() as url:
        assert_undisturbed(*await run_python(tmp_path, BUSY, **{ENDPOINT: url}), tmp_path)


@pytest.mark.parametrize(("slow_s", "status"), [(30.0, 200), (0.0, 500), (0.0, 503), (0.0, 429), (0.0, 400)])
async def test_a_slow_or_broken_collector_disturbs_nothing(
    tmp_path: Path, slow_s: float, status: int
) -> None:
    async with run_collector(slow_s, status) as collector:
        assert_undisturbed(*await run_python(tmp_path, BUSY, **{ENDPOINT: collector.url}), tmp_path)
        assert collector.requests >= 1


@pytest.mark.parametrize(("status", "waits"), [(200, [FLUSH_S, FLUSH_S]), (400, [FLUSH_S, FAILING_FLUSH_S])])
async def test_the_last_flush_to_a_failing_collector_is_short(
    tmp_path: Path, status: int, waits: list[float]
) -> None:
    async with run_collector(status=status) as collector:
        output = await run_python(
            tmp_path, LEAVES, OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=f"{collector.url}/v1/logs"
        )
    assert [float(line) for line in output[0].split()] == waits


async def test_an_unknown_host_name_disturbs_nothing(tmp_path: Path) -> None:
    assert_undisturbed(
        *await run_python(tmp_path, BUSY, **{ENDPOINT: "http://collector.invalid:4318"}), tmp_path
    )


async def test_a_late_collector_gets_the_queued_spans(tmp_path: Path) -> None:
    """The first sending fails; the next ones do not."""
    waits = BUSY.replace('    print("worked")', '    import sys; sys.stdin.readline(); print("worked")')
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        waits,
        env=clean
        | {
            "FEDBUS_HOME": str(tmp_path),
            ENDPOINT: f"http://127.0.0.1:{port}",
            "OTEL_BLRP_SCHEDULE_DELAY": "100",
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin
    async with run_collector(port=port) as collector, asyncio.timeout(LONGEST_S):
        await eventually(lambda: bool(collector.log_lines or collector.spans), within_s=40)
        process.stdin.write(b"\n")
        await process.communicate()
