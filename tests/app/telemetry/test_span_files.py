"""Span files: what each process writes, the limits, and what `fedbus trace` reads."""

import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import typer
from google.protobuf.json_format import Parse  # type: ignore[import-untyped]
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.trace import Link, SpanKind, StatusCode
from support import eventually
from support.cli import CliResult, clean_environment, run_python
from typer.testing import CliRunner

from fedbus.app.cli.commands.trace import trace as draw
from fedbus.app.failures import CliError
from fedbus.app.telemetry import span_reader
from fedbus.app.telemetry.span_files import (
    MESSAGE_CHARS,
    SUFFIX,
    SpanFileExporter,
    SpanFileProcessor,
    SpanRecord,
    encode_block,
    prune,
)
from fedbus.app.telemetry.tracer import ErrorTypeProvider, sdk_provider
from fedbus.domain.critical_path import SpanStatus, SpanTree

RUN = "digits-1"
WRITES_SPANS = """
import sys
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry

with configure_telemetry(sys.argv[1], client="c1"):
    with trace.get_tracer("test").start_as_current_span("run • → requested", attributes={"fedbus.run": "digits-1"}):
        with trace.get_tracer("test").start_as_current_span("round", attributes={"fedbus.round": 1}):
            pass
"""


@contextmanager
def stored_in(directory: Path, **limits: int) -> Iterator[trace.Tracer]:
    """A tracer whose spans are in *directory* when the block has ended."""
    provider = sdk_provider({})
    exporter = SpanFileExporter(
        directory, {"service.name": "fedbus-test"}, max_bytes=limits.pop("max_bytes", 2**20), **limits
    )
    provider.add_span_processor(SpanFileProcessor(exporter, every_s=0.001))
    try:
        yield ErrorTypeProvider(provider).get_tracer("a module")
    finally:
        provider.shutdown()


def records(directory: Path, span: trace.Span) -> list[SpanRecord]:
    """All stored records of the trace of *span*."""
    blocks = span_reader.read_trace(directory, f"{span.get_span_context().trace_id:032x}").blocks
    return [record for _, found in blocks for record in found]


def run_code(home: Path, code: str, *arguments: str, **environment: str) -> CliResult:
    variables = clean_environment() | {"FEDBUS_HOME": str(home)} | environment
    return run_python(code, *arguments, environment=variables)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes have stored a trace each."""
    home = tmp_path_factory.mktemp("home")
    for service in ("fedbus-server", "fedbus-trainer"):
        run_code(home, WRITES_SPANS, service)
    return home / "traces"


@pytest.fixture
def home(tmp_path: Path, traces: Path) -> Path:
    """A machine with a copy of *traces*."""
    shutil.copytree(traces, tmp_path / "traces")
    return tmp_path


def test_each_process_writes_its_own_file(home: Path) -> None:
    names = sorted(path.name.partition("-")[2].partition("-")[0] for path in (home / "traces").iterdir())

    assert names == ["server", "trainer"]


def test_a_disabled_sdk_and_a_limit_of_zero_store_nothing(tmp_path: Path) -> None:
    run_code(tmp_path, WRITES_SPANS, "fedbus-server", OTEL_SDK_DISABLED="true")
    run_code(tmp_path, WRITES_SPANS, "fedbus-server", FEDBUS_TRACES_MB="0")

    assert not (tmp_path / "traces").exists()


def test_a_span_is_stored_whole(tmp_path: Path) -> None:
    with stored_in(tmp_path) as tracer, tracer.start_as_current_span("above") as above:
        link = Link(above.get_span_context())
        with (
            pytest.raises(ValueError, match="no"),
            tracer.start_as_current_span("below", kind=SpanKind.CLIENT, attributes={"n": 3}, links=[link]),
        ):
            raise ValueError("no")

    trace_id = f"{above.get_span_context().trace_id:032x}"
    ((resource, found),) = span_reader.read_trace(tmp_path, trace_id).blocks
    below, over = sorted(found, key=lambda record: record.name == "above")
    assert resource == {"service.name": "fedbus-test"}
    assert (below.name, below.kind, below.scope) == ("below", 3, "a module")
    assert below.attributes == {"n": 3, "error.type": "ValueError"}
    assert below.parent_id == over.span_id
    assert list(map(tuple, below.links)) == [(over.trace_id, over.span_id)]
    assert (below.status, below.message) == (2, "ValueError: no")
    assert below.events[0][2]["exception.type"] == "ValueError"
    assert over.start <= below.start <= below.end <= over.end


def test_a_span_is_stored_as_it_was_when_it_ended(tmp_path: Path) -> None:
    with stored_in(tmp_path) as tracer:
        span = tracer.start_span("first")
        span.update_name("then")
        span.set_attributes({"a": 1})
        span.set_attribute("b", "x")
        span.add_event("sent", {"c": True})
        span.add_link(span.get_span_context())
        span.set_status(StatusCode.OK)
        span.end()

    (record,) = records(tmp_path, span)
    assert (record.name, record.attributes, record.status) == ("then", {"a": 1, "b": "x"}, 1)
    assert (record.events[0][0], record.events[0][2], len(record.links)) == ("sent", {"c": True}, 1)


def test_a_stored_exception_has_no_stack_trace(tmp_path: Path) -> None:
    with (
        stored_in(tmp_path) as tracer,
        pytest.raises(ValueError, match="xxx"),
        tracer.start_as_current_span("fails") as span,
    ):
        raise ValueError("x" * 10_000)

    ((_, _, about),) = records(tmp_path, span)[0].events
    assert about == {"exception.type": "ValueError", "exception.message": "x" * MESSAGE_CHARS}


async def test_a_cancelled_block_is_not_an_error(tmp_path: Path) -> None:
    with (
        stored_in(tmp_path) as tracer,
        suppress(asyncio.CancelledError),
        tracer.start_as_current_span("cancelled") as span,
    ):
        raise asyncio.CancelledError

    (record,) = records(tmp_path, span)
    assert record.status == 0
    assert not record.events
    assert not record.attributes


def test_a_span_keeps_the_links_to_many_clients(tmp_path: Path) -> None:
    remote = trace.SpanContext(7, 9, is_remote=True)
    with stored_in(tmp_path) as tracer, tracer.start_as_current_span("aggregate") as span:
        for _ in range(500):
            span.add_link(remote)

    assert len(records(tmp_path, span)[0].links) == 500


def test_the_sampler_of_the_standard_variable_is_used(tmp_path: Path) -> None:
    run_code(tmp_path, WRITES_SPANS, "fedbus-server", OTEL_TRACES_SAMPLER="always_off")

    assert not (tmp_path / "traces").exists()


def test_a_tracer_made_before_the_provider_uses_it_later(tmp_path: Path) -> None:
    output = run_code(
        tmp_path,
        """
from fedbus.contracts.telemetry import get_tracer
from fedbus.app.telemetry import configure_telemetry

tracer = get_tracer("a module")
with tracer.start_as_current_span("too soon") as span:
    assert not span.is_recording()
with configure_telemetry("fedbus-server"), tracer.start_as_current_span("kept") as span:
    print(f"{span.get_span_context().trace_id:032x}")
""",
    )

    ((_, (record,)),) = span_reader.read_trace(tmp_path / "traces", output.out.strip()).blocks
    assert (record.name, record.scope) == ("kept", "a module")


def test_a_span_continues_a_remote_one(tmp_path: Path) -> None:
    remote = trace.SpanContext(7, 9, is_remote=True, trace_flags=trace.TraceFlags(1))
    with stored_in(tmp_path) as tracer:
        parent = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        with tracer.start_as_current_span("x", parent) as span:
            assert trace.get_current_span().get_span_context().trace_id == 7

    (record,) = records(tmp_path, span)
    assert (int.from_bytes(record.trace_id, "big"), int.from_bytes(record.parent_id, "big")) == (7, 9)


def test_the_files_have_a_limit_and_the_oldest_go(tmp_path: Path) -> None:
    provider = sdk_provider({})
    limits = {"max_bytes": 20_000, "file_bytes": 2_000}
    exporter = SpanFileExporter(tmp_path, {"service.name": "fedbus-test"}, **limits)
    provider.add_span_processor(SpanFileProcessor(exporter))
    tracer = provider.get_tracer("a module")
    for number in range(2_000):
        tracer.start_span(f"span {number}", attributes={"filler": "x" * 50}).end()
        if number % 50 == 49:
            provider.force_flush()  # otherwise a busy machine writes all spans in one block
    provider.shutdown()

    files = list(tmp_path.glob(f"*{SUFFIX}"))
    written = b"".join(file.read_bytes() for file in files)
    assert sum(file.stat().st_size for file in files) <= 20_000 + 2 * 8192, (
        "one block more than the bound at most"
    )
    assert b"span 1999\x01" in written
    assert b"span 0\x01" not in written


def test_the_file_written_to_longest_ago_is_dropped_first(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"{number}{SUFFIX}"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000 + number))
    prune(tmp_path, 250)

    assert sorted(path.name for path in tmp_path.iterdir()) == [f"1{SUFFIX}", f"2{SUFFIX}"]


def test_a_full_disk_stops_no_process_and_is_logged_once(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("in the way")
    output = run_code(tmp_path, WRITES_SPANS + WRITES_SPANS.partition("\n\n")[2], "fedbus-server")

    assert output.err.count("Cannot store spans") <= 2
    assert "Traceback" not in output.err


def test_truncated_and_foreign_blocks_are_skipped(tmp_path: Path) -> None:
    first, second = (
        encode_block({"service.name": "x"}, [SpanRecord(b"t" * 16, span_id, b"", "whole", 1, 1, 2, {})])
        for span_id in (b"s" * 8, b"r" * 8)
    )
    (tmp_path / f"a{SUFFIX}").write_bytes(first + first[:-5])
    (tmp_path / f"b{SUFFIX}").write_bytes((20).to_bytes(4, "big") + b"t" * 20 + second)

    assert [span.name for span in span_reader.read_trace(tmp_path, (b"t" * 16).hex()).spans()] == [
        "whole",
        "whole",
    ]


# --- open spans -----------------------------------------------------------------------------------


WAITS_IN_ROUND = """
import sys
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry

tracer = trace.get_tracer("test")
with configure_telemetry("fedbus-server"):
    with tracer.start_as_current_span("run by manual"):
        with tracer.start_as_current_span("run • → requested", attributes={"fedbus.run": "digits-1"}):
            pass
        with tracer.start_as_current_span("round", attributes={"fedbus.round": 1}):
            print("it stays", flush=True)
            sys.stdin.read()
"""


@contextmanager
def run_waiting_process(home: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A process inside a round, until its standard input is closed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL")}
    with subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_ROUND],
        env=clean | {"FEDBUS_HOME": str(home)} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_endings(home: Path) -> dict[str, SpanStatus]:
    found = span_reader.find_trace_of_run(home / "traces", RUN)
    return (
        {one.name: one.status for one in span_reader.read_trace(home / "traces", found).spans()}
        if found
        else {}
    )


@pytest.mark.parametrize("collector", ["", "http://127.0.0.1:9"], ids=["alone", "with a collector named"])
async def test_a_run_in_progress_is_one_tree_of_open_spans(tmp_path: Path, collector: str) -> None:
    with run_waiting_process(
        tmp_path, **({"OTEL_EXPORTER_OTLP_ENDPOINT": collector} if collector else {})
    ) as process:
        await eventually(lambda: len(read_endings(tmp_path)) == 3)
        assert read_endings(tmp_path) == {
            "run by manual": SpanStatus.OPEN,
            "run • → requested": SpanStatus.ENDED,
            "round": SpanStatus.OPEN,
        }
        output = run_trace(tmp_path, RUN)
        assert output.startswith(f"{RUN} is requested: ")
        assert "\n3 spans (2 in progress), of 1 processes" in output
        assert "\nround 1 has taken " in output
        assert "\nin progress: round 1 for " in output
        assert output.endswith(f"live: fedbus run watch {RUN} · again: fedbus trace {RUN}\n")

        process.communicate("")
        assert set(read_endings(tmp_path).values()) == {SpanStatus.ENDED}


async def test_the_open_spans_of_a_killed_process_are_cut_off(tmp_path: Path) -> None:
    with run_waiting_process(tmp_path) as process:
        await eventually(lambda: len(read_endings(tmp_path)) == 3)
        process.kill()
        process.wait()

    assert read_endings(tmp_path)["round"] is SpanStatus.CUT_OFF
    output = run_trace(tmp_path, RUN)
    assert output.startswith(
        f"{RUN} was abandoned while requested: its process has ended; the last span ended at "
    )
    assert "✗ is cut off: its process ended before the span did" in output
    assert "fedbus run watch" not in output


async def test_an_export_gives_open_spans_an_end_and_marks_them(
    tmp_path: Path,
) -> None:
    with run_waiting_process(tmp_path):
        await eventually(lambda: len(read_endings(tmp_path)) == 3)
        output = run_trace(tmp_path, RUN, "--otlp-json", str(tmp_path / "trace.json"))

    assert output == f"3 spans (2 in progress) are in {tmp_path / 'trace.json'}\n"
    exported = TracesData()
    Parse((tmp_path / "trace.json").read_text().replace("\n", ""), exported)
    spans = [span for one in exported.resource_spans for scope in one.scope_spans for span in scope.spans]
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for span in spans)
    marked = {
        span.name: [one.value.string_value for one in span.attributes if one.key == "fedbus.ending"]
        for span in spans
    }
    assert marked == {"run by manual": ["in progress"], "run • → requested": [], "round": ["in progress"]}


def test_a_later_process_with_the_same_pid_is_another_one() -> None:
    here = {"host.name": platform.node(), "process.pid": os.getpid()}
    of_old = SpanRecord(b"t" * 16, b"s" * 8, b"", "round", 1, 1, 0, {})

    (span,) = span_reader.StoredTrace("74" * 16, [(here, [of_old])]).spans()
    assert span.status is SpanStatus.CUT_OFF


def test_open_spans_of_another_machine_are_in_progress() -> None:
    there = {"host.name": "another", "process.pid": os.getpid()}

    (span,) = span_reader.StoredTrace(
        "74" * 16, [(there, [SpanRecord(b"t" * 16, b"s" * 8, b"", "x", 1, 1, 0, {})])], read_at_ns=9
    ).spans()
    assert span.status is SpanStatus.OPEN
    assert span.end == pytest.approx(9e-9)


# --- fedbus trace ------------------------------------------------------------------------------------


def run_trace(home: Path, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(draw)
    return CliRunner(env={"FEDBUS_HOME": str(home)}).invoke(app, arguments, catch_exceptions=False).output


def test_a_run_is_drawn_with_every_span_by_name(home: Path) -> None:
    output = run_trace(home, RUN, "--width", "100")

    assert "run • → requested" in output
    assert "round 1 took" in output
    assert all(len(line) <= 100 for line in output.splitlines()[2:])


def test_without_a_name_the_newest_run_is_drawn(home: Path) -> None:
    assert RUN in run_trace(home)


def test_the_words_option_prints_the_words_only(home: Path) -> None:
    (line,) = run_trace(home, RUN, "--words").splitlines()

    assert line.startswith("round 1 took")
    assert line.endswith("% waiting for the ServerApp")


def test_the_export_is_otlp_that_a_collector_reads(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    output = run_trace(home, RUN, "--otlp-json", str(file))

    assert output == f"2 spans are in {file}\n"
    document = json.loads(file.read_text())
    ((resource,),) = (document["resourceSpans"],)
    assert {"key": "fedbus.client", "value": {"stringValue": "c1"}} in resource["resource"]["attributes"]
    (scope,) = resource["scopeSpans"]
    assert [len(span["traceId"]) for span in scope["spans"]] == [32, 32]
    assert set(scope["spans"][0]) <= set(
        TracesData.DESCRIPTOR.fields_by_name["resource_spans"]
        .message_type.fields_by_name["scope_spans"]
        .message_type.fields_by_name["spans"]
        .message_type.fields_by_camelcase_name
    )


def test_a_file_that_cannot_be_written_is_one_line(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "trace.json"
    with pytest.raises(CliError, match=rf"cannot write {file}: No such file or directory"):
        run_trace(home, RUN, "--otlp-json", str(file))


def test_an_unknown_run_is_one_line_with_the_known_runs(home: Path) -> None:
    with pytest.raises(CliError, match=rf"no trace of digits-9 in .*: stored runs: {RUN}"):
        run_trace(home, "digits-9")


def test_a_machine_without_traces_reports_that(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"no trace of any run in .*: no runs are stored"):
        run_trace(tmp_path)


def test_the_tree_of_stored_spans_is_complete(home: Path) -> None:
    found = span_reader.find_trace_of_run(home / "traces", RUN)
    assert found is not None
    tree = SpanTree(span_reader.read_trace(home / "traces", found).spans())

    (root,) = tree.roots
    assert [child.name for child in tree.children(root)] == ["round"]


def test_the_traces_of_the_demo_are_found_by_default(home: Path, tmp_path: Path) -> None:
    (home / "traces").rename(tmp_path / "aside")
    (home / "demo").mkdir()
    (tmp_path / "aside").rename(home / "demo" / "traces")

    assert RUN in run_trace(home)
