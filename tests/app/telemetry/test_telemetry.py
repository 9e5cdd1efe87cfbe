"""Telemetry, in processes of its own: what is set up once cannot be taken back."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fedbus.app.telemetry.exceptions import FRAMES, SAYS, WITHIN

SPEAKS = """
import logging
import structlog
from opentelemetry import trace
from fedbus.app.telemetry import configured

with configured("fedbus-trainer", client="c1"):
    with trace.get_tracer("test").start_as_current_span("train"):
        structlog.get_logger("fedbus.test").info("round finished", round=2)
        logging.getLogger("some.library").warning("beware of %s", "this")
    structlog.get_logger("fedbus.test").debug("a detail")
"""
FAILS = """
import structlog
from fedbus.app.telemetry import configured

with configured("fedbus-trainer"):
    try:
        1 / 0
    except ZeroDivisionError:
        structlog.get_logger("fedbus.test").exception("it broke")
"""


SECRET: Final = "patient 4711"
HOLDS_DATA: Final = """
import structlog
from fedbus.app.telemetry import configured

def train(rows, depth):
    if depth:
        return train(rows, depth - 1)
    raise ValueError("x" * 10_000)

with configured("fedbus-trainer"):
    try:
        try:
            train(["patient" + " 4711"] * 3, 200)
        except ValueError as error:
            raise ExceptionGroup("all of them", [error] * 50) from error
    except ExceptionGroup:
        structlog.get_logger("fedbus.test").exception("it broke")
"""


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"FEDBUS_TRACES_MB": "0"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_every_line_is_json_with_its_trace_where_nobody_watches() -> None:
    said = run(SPEAKS)
    ours, theirs = (json.loads(line) for line in said.stderr.splitlines())

    assert said.stdout == ""
    assert (ours["event"], ours["round"], ours["level"]) == ("round finished", 2, "info")
    assert (ours["agent"], ours["client"], ours["logger"]) == ("trainer", "c1", "fedbus.test")
    assert (theirs["event"], theirs["level"]) == ("beware of this", "warning")
    assert len(ours["trace_id"]) == 32
    assert (ours["trace_id"], ours["span_id"]) == (theirs["trace_id"], theirs["span_id"])


def test_the_level_is_a_setting() -> None:
    assert "a detail" in run(SPEAKS, FEDBUS_LOG_LEVEL="debug").stderr
    assert run(SPEAKS, FEDBUS_LOG_LEVEL="error").stderr == ""


def test_a_table_that_a_library_says_is_its_words() -> None:
    (line,) = run("""
import logging
from fedbus.app import telemetry
telemetry.log_to_stderr()
logging.getLogger("some.library").info({3: ("a", 4)})
""").stderr.splitlines()

    assert json.loads(line)["event"] == "{3: ('a', 4)}"


def test_an_exception_stays_one_line() -> None:
    (line,) = run(FAILS).stderr.splitlines()

    assert json.loads(line)["exception"][0]["exc_type"] == "ZeroDivisionError"


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_is_told_without_the_data_that_its_frames_held(form: str) -> None:
    said = run(HOLDS_DATA, FEDBUS_LOG_FORMAT=form).stderr

    assert "ValueError" in said
    assert "train" in said
    assert SECRET not in said


def test_an_exception_is_told_within_bounds() -> None:
    (line,) = run(HOLDS_DATA).stderr.splitlines()

    assert len(line) < 200_000
    (group,) = json.loads(line)["exception"]
    assert (group["exc_type"], len(group["exceptions"])) == ("ExceptionGroup", WITHIN)
    ((error,), *_) = group["exceptions"]
    assert error["exc_value"].startswith("xxx")
    assert len(error["exc_value"]) < 2 * SAYS
    assert len(error["frames"]) == FRAMES


def test_nobody_listening_costs_no_time_and_no_stack_trace() -> None:
    began = time.monotonic()
    said = run(SPEAKS, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")

    assert time.monotonic() - began < 10
    assert "Traceback" not in said.stderr
    assert len(said.stderr.splitlines()) <= 5


class Collector(HTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), TakesSpans)
        self.requests: list[ExportTraceServiceRequest] = []


class TakesSpans(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":  # figures and lines come too
            self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not in the tests' output."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_spans_reach_the_collector_before_the_process_ends(collector: Collector) -> None:
    run(SPEAKS, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}")

    (sent,) = collector.requests[0].resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
    assert resource["service.name"] == "fedbus-trainer"
    assert resource["fedbus.client"] == "c1"
    assert [span.name for span in sent.scope_spans[0].spans] == ["train"]


def test_the_format_is_a_setting() -> None:
    said = run(SPEAKS, FEDBUS_LOG_FORMAT="console").stderr

    assert "round finished" in said
    assert not said.startswith("{")
    assert run(SPEAKS, FEDBUS_LOG_FORMAT="json").stderr.startswith("{")


def test_a_level_that_is_none_is_no_reason_to_stop() -> None:
    assert "round finished" in run(SPEAKS, FEDBUS_LOG_LEVEL="loud").stderr


FLOWER: Final = """
import logging
from fedbus.app import telemetry
from fedbus.app.telemetry.lines import told_once
telemetry.log_to_stderr()
import flwr.supercore.logger
told_once("flwr")
flwr.supercore.logger.log(logging.INFO, "a round")
"""


def test_a_library_with_a_console_of_its_own_is_told_once() -> None:
    said = run(FLOWER)

    assert (said.stdout + said.stderr).count("a round") == 1


def test_a_library_with_a_level_of_its_own_has_the_one_that_is_set() -> None:
    assert run(FLOWER, FEDBUS_LOG_LEVEL="warning").stderr == ""


def test_blank_lines_of_a_library_are_no_lines() -> None:
    """Flower sets its own apart with them; where each line is a fact there is nothing to tell."""
    said = run(
        """
import logging
from fedbus.app import telemetry
telemetry.log_to_stderr()
for words in ("", "\\t", "Final results:"):
    logging.getLogger("flwr").info(words)
"""
    )
    assert [json.loads(line)["event"] for line in said.stderr.splitlines()] == ["Final results:"]


def test_a_library_with_a_file_of_its_own_writes_it_in_its_own_way() -> None:
    """Weights & Biases does; a line of its that cannot be formatted is twenty of an error on standard error."""
    said = run(
        """
import logging, sys
from fedbus.app import telemetry
telemetry.log_to_stderr()
own = logging.StreamHandler(sys.stdout)
own.setFormatter(logging.Formatter("%(threadName)s:%(process)d:%(thread)d %(processName)s %(message)s"))
logging.getLogger("wandb").addHandler(own)
logging.getLogger("wandb").warning("a round")
"""
    )
    (line,) = said.stderr.splitlines()
    assert json.loads(line)["event"] == "a round"
    assert said.stdout.startswith("MainThread:")
    assert said.stdout.endswith(" MainProcess a round\n")


ORDERED: Final = """
import logging, sys
from fedbus.app import telemetry

telemetry.log_to_stderr()
log, said = logging.getLogger("some.library"), []
log.info("first %s", said)
said.append("changed since")
{then}
"""


def test_lines_keep_their_order_and_are_as_they_were_when_they_were_said() -> None:
    lines = [json.loads(line) for line in run(ORDERED.format(then='log.error("then")')).stderr.splitlines()]

    assert [line["event"] for line in lines] == ["first []", "then"]
    assert lines[0]["timestamp"] < lines[1]["timestamp"]


def test_an_error_and_all_before_it_are_written_when_a_process_falls_at_once() -> None:
    said = run(ORDERED.format(then='log.error("the disk is full"); __import__("os")._exit(0)')).stderr

    assert [json.loads(line)["event"] for line in said.splitlines()] == ["first []", "the disk is full"]


def test_a_child_that_leaves_without_a_goodbye_has_said_all() -> None:
    leaves = SPEAKS + "\nimport os; os._exit(0)"

    assert len(run(leaves).stderr.splitlines()) == 2


def test_a_line_is_written_soon_while_nothing_else_happens() -> None:
    waits = "import os, time\nr, w = os.pipe(); os.dup2(w, 2)\n" + ORDERED.format(
        then="print(os.read(r, 1000).decode())"
    )

    assert "first []" in run(waits).stdout
