"""Telemetry, each test in its own process: the providers of a process can be set once."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.cli import CliResult, clean_environment, run_python

from fedbus.app.telemetry.exceptions import CHAIN_LENGTH, MAX_FRAMES, MESSAGE_CHARS
from fedbus.app.telemetry.log_lines import plain_text

LOGS_AND_TRACES = """
import logging
import structlog
from opentelemetry import trace
from fedbus.app.telemetry import configure_telemetry

with configure_telemetry("fedbus-trainer", client="c1"):
    with trace.get_tracer("test").start_as_current_span("train"):
        structlog.get_logger("fedbus.test").info("round finished", round=2)
        logging.getLogger("some.library").warning("beware of %s", "this")
    structlog.get_logger("fedbus.test").debug("a detail")
"""
FAILS = """
import structlog
from fedbus.app.telemetry import configure_telemetry

with configure_telemetry("fedbus-trainer"):
    try:
        1 / 0
    except ZeroDivisionError:
        structlog.get_logger("fedbus.test").exception("it broke")
"""


SECRET: Final = "patient 4711"
HOLDS_DATA: Final = """
import structlog
from fedbus.app.telemetry import configure_telemetry

def train(rows, depth):
    if depth:
        return train(rows, depth - 1)
    raise ValueError("x" * 10_000)

with configure_telemetry("fedbus-trainer"):
    try:
        try:
            train(["patient" + " 4711"] * 3, 200)
        except ValueError as error:
            raise ExceptionGroup("all of them", [error] * 50) from error
    except ExceptionGroup:
        structlog.get_logger("fedbus.test").exception("it broke")
"""


def run_code(code: str, **environment: str) -> CliResult:
    return run_python(code, environment=clean_environment() | {"FEDBUS_TRACES_MB": "0"} | environment)


def test_without_a_terminal_each_line_is_json_with_its_trace() -> None:
    output = run_code(LOGS_AND_TRACES)
    ours, theirs = (json.loads(line) for line in output.err.splitlines())

    assert output.out == ""
    assert (ours["event"], ours["round"], ours["level"]) == ("round finished", 2, "info")
    assert (ours["agent"], ours["client"], ours["logger"]) == ("trainer", "c1", "fedbus.test")
    assert (theirs["event"], theirs["level"]) == ("beware of this", "warning")
    assert len(ours["trace_id"]) == 32
    assert (ours["trace_id"], ours["span_id"]) == (theirs["trace_id"], theirs["span_id"])


def test_the_level_is_a_setting() -> None:
    assert "a detail" in run_code(LOGS_AND_TRACES, FEDBUS_LOG_LEVEL="debug").err
    assert run_code(LOGS_AND_TRACES, FEDBUS_LOG_LEVEL="error").err == ""


def test_a_dict_logged_by_a_library_is_its_message() -> None:
    (line,) = run_code("""
import logging
from fedbus.app import telemetry
telemetry.log_to_stderr()
logging.getLogger("some.library").info({3: ("a", 4)})
""").err.splitlines()

    assert json.loads(line)["event"] == "{3: ('a', 4)}"


PEOPLE: Final = """
import structlog
from fedbus.app import telemetry
telemetry.log_to_stderr(level="WARNING", log_format="console", agent="up")
structlog.get_logger("fedbus.stack").warning("Process ended; restarting", process="c1", reason="killed")
"""


def test_a_log_for_people_is_readable_in_a_pipe() -> None:
    (line,) = run_code(PEOPLE).err.splitlines()
    assert "Process ended; restarting" in line
    assert not line.startswith("{")
    assert "process=c1 reason=killed" in line, "without colours"
    assert run_code(PEOPLE, FEDBUS_LOG_FORMAT="json").err.startswith("{")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            '{"agent": "c1", "event": "Model download failed", "reason": "no space"}',
            "Model download failed: no space",
        ),
        ('{"event": "Run opened", "reason": null}', "Run opened"),
        ("fedbus: port 1 is taken", "fedbus: port 1 is taken"),
        ('{"loss": 1}', '{"loss": 1}'),
        ("17", "17"),
    ],
)
def test_the_last_log_line_of_a_process_is_quoted_as_text(line: str, text: str) -> None:
    assert plain_text(line) == text


def test_an_exception_stays_one_line() -> None:
    (line,) = run_code(FAILS).err.splitlines()

    assert json.loads(line)["exception"][0]["exc_type"] == "ZeroDivisionError"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_logged_exception_has_no_local_variables(form: str) -> None:
    output = run_code(HOLDS_DATA, FEDBUS_LOG_FORMAT=form).err

    assert "ValueError" in output
    assert "train" in output
    assert SECRET not in output


def test_a_logged_exception_is_limited() -> None:
    (line,) = run_code(HOLDS_DATA).err.splitlines()

    assert len(line) < 200_000
    (group,) = json.loads(line)["exception"]
    assert (group["exc_type"], len(group["exceptions"])) == ("ExceptionGroup", CHAIN_LENGTH)
    ((error,), *_) = group["exceptions"]
    assert error["exc_value"].startswith("xxx")
    assert len(error["exc_value"]) < 2 * MESSAGE_CHARS
    assert len(error["frames"]) == MAX_FRAMES


def test_an_absent_collector_costs_no_time_and_no_stack_trace() -> None:
    began = time.monotonic()
    output = run_code(LOGS_AND_TRACES, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")

    assert time.monotonic() - began < 60, "it waited for a timeout"
    assert "Traceback" not in output.err
    assert len(output.err.splitlines()) <= 5


class SpanReceiver(HTTPServer):
    """Receives spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SpanRequestHandler)
        self.requests: list[ExportTraceServiceRequest] = []


class SpanRequestHandler(BaseHTTPRequestHandler):
    server: SpanReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":  # metrics and log lines arrive too
            self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not in the tests' output."""


@pytest.fixture
def collector() -> Iterator[SpanReceiver]:
    with SpanReceiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_spans_reach_the_collector_before_the_process_ends(collector: SpanReceiver) -> None:
    run_code(LOGS_AND_TRACES, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}")

    (sent,) = collector.requests[0].resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
    assert resource["service.name"] == "fedbus-trainer"
    assert resource["fedbus.client"] == "c1"
    assert [span.name for span in sent.scope_spans[0].spans] == ["train"]


def test_the_format_is_a_setting() -> None:
    output = run_code(LOGS_AND_TRACES, FEDBUS_LOG_FORMAT="console").err

    assert "round finished" in output
    assert not output.startswith("{")
    assert run_code(LOGS_AND_TRACES, FEDBUS_LOG_FORMAT="json").err.startswith("{")


def test_an_invalid_level_is_ignored() -> None:
    assert "round finished" in run_code(LOGS_AND_TRACES, FEDBUS_LOG_LEVEL="loud").err


FLOWER: Final = """
import logging
from fedbus.app import telemetry
from fedbus.learning.flower.library import remove_log_handlers
telemetry.log_to_stderr()
import flwr.supercore.logger
remove_log_handlers()
flwr.supercore.logger.log(logging.INFO, "a round")
"""


def test_a_library_with_its_own_handler_is_logged_once() -> None:
    output = run_code(FLOWER)

    assert (output.out + output.err).count("a round") == 1


def test_a_library_with_its_own_level_uses_the_configured_one() -> None:
    assert run_code(FLOWER, FEDBUS_LOG_LEVEL="warning").err == ""


def test_blank_lines_of_a_library_are_dropped() -> None:
    """Flower separates its lines with them."""
    output = run_code(
        """
import logging
from fedbus.app import telemetry
telemetry.log_to_stderr()
for words in ("", "\\t", "Final results:"):
    logging.getLogger("flwr").info(words)
"""
    )
    assert [json.loads(line)["event"] for line in output.err.splitlines()] == ["Final results:"]


def test_a_library_with_its_own_file_formats_it_itself() -> None:
    """Weights & Biases does; a formatting error would print twenty lines to standard error."""
    code = """
import logging, sys
from fedbus.app import telemetry
telemetry.log_to_stderr()
own = logging.StreamHandler(sys.stdout)
own.setFormatter(logging.Formatter("%(threadName)s:%(process)d:%(thread)d %(processName)s %(message)s"))
logging.getLogger("wandb").addHandler(own)
logging.getLogger("wandb").warning("a round")
"""
    process = subprocess.run(  # not forked by multiprocessing, which names its processes
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, check=True
    )
    (line,) = process.stderr.splitlines()
    assert json.loads(line)["event"] == "a round"
    assert process.stdout.startswith("MainThread:")
    assert process.stdout.endswith(" MainProcess a round\n")


ORDERED: Final = """
import logging, sys
from fedbus.app import telemetry

telemetry.log_to_stderr()
log, said = logging.getLogger("some.library"), []
log.info("first %s", said)
said.append("changed since")
{then}
"""


def test_lines_are_in_order_and_formatted_when_logged() -> None:
    lines = [json.loads(line) for line in run_code(ORDERED.format(then='log.error("then")')).err.splitlines()]

    assert [line["event"] for line in lines] == ["first []", "then"]
    assert lines[0]["timestamp"] < lines[1]["timestamp"]


def test_all_lines_are_written_when_a_process_exits_at_once() -> None:
    output = run_code(ORDERED.format(then='log.error("the disk is full"); __import__("os")._exit(0)')).err

    assert [json.loads(line)["event"] for line in output.splitlines()] == ["first []", "the disk is full"]


def test_all_lines_of_a_block_are_written_before_it_ends() -> None:
    leaves = LOGS_AND_TRACES + "\nimport os; os._exit(0)"

    assert len(run_code(leaves).err.splitlines()) == 2


def test_a_line_is_written_when_it_is_logged() -> None:
    waits = "import os, time\nr, w = os.pipe(); os.dup2(w, 2)\n" + ORDERED.format(
        then="print(os.read(r, 1000).decode())"
    )

    assert "first []" in run_code(waits).out
