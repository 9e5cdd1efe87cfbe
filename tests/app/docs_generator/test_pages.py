"""The generated pages in the repository are up to date and complete."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from fedbus.app.docs_generator.model_docs import field_entries
from fedbus.app.docs_generator.pages import (
    PAGES,
    body_schema,
    catalogue_entries,
    events_page,
    lifecycles_page,
)
from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.client import ClientData
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.envelope import make_envelope
from fedbus.contracts.examples import EXAMPLES, REPLIES
from fedbus.contracts.message import Body
from fedbus.contracts.run import StartRun
from fedbus.contracts.scheduling import ScheduleData
from fedbus.contracts.server import ServerClosed
from fedbus.contracts.transition import LIFECYCLES

DOCS = Path(__file__).parents[3] / "docs"
ASYNCAPI = Path(__file__).with_name("asyncapi") / "3.0.0.json"
EVERY_BODY = [*EXAMPLES.values(), *REPLIES.values()]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_the_repository_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "the page is outdated: run make docs"


def test_the_page_has_every_message_with_all_its_fields() -> None:
    page = events_page()
    for kind in MESSAGES:
        section = page.partition(f"### {kind.name}\n")[2].partition("### ")[0]
        assert all(f"| `{field}` |" in section for field in kind.model_fields), kind.name


def test_a_field_is_described_by_its_docstring() -> None:
    assert "True if the trainer process ended without reporting a reason." in events_page()


def test_a_message_names_all_its_publishers() -> None:
    publishers = {entry.kind: entry.publisher for entry in catalogue_entries()}
    assert publishers[StartRun] == "server-manager, user"


@pytest.mark.parametrize(
    ("kind", "field", "text"),
    [
        (ClientData, "run", "str | None"),
        (ClientData, "labels", "dict[str, str]"),
        (DeviceReport, "gpus", "tuple[GpuUse, ...]"),
        (ScheduleData, "since", "datetime"),
        (ServerClosed, "outcome", "Literal['finished', 'failed', 'cancelled']"),
        (StartRun, "config", "dict[str, bool | int | float | str]"),
    ],
)
def test_a_type_is_written_without_modules_and_constraints(kind: type[Body], field: str, text: str) -> None:
    assert {one.name: one.type for one in field_entries(kind)}[field] == text


def test_every_link_within_the_events_page_has_a_target() -> None:
    page = events_page()
    headings = {line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= headings


def test_every_lifecycle_has_a_diagram() -> None:
    page = lifecycles_page()
    assert all(lifecycle.mermaid() in page for lifecycle in LIFECYCLES.values())


def test_every_reference_in_the_asyncapi_page_has_a_target() -> None:
    document = json.loads(PAGES["asyncapi.yaml"]().partition("\n")[2])

    def check(node: object) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                found = document
                for part in str(node["$ref"]).removeprefix("#/").split("/"):
                    found = found[part]
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(document)
    assert set(document["channels"]) == {entry.name for entry in catalogue_entries()} | {"answers"}


def test_the_asyncapi_page_has_all_headers_and_replies() -> None:
    document = json.loads(PAGES["asyncapi.yaml"]().partition("\n")[2])
    messages, actual = document["components"]["messages"], envelope_headers()
    headers = document["components"]["messageTraits"]["envelope"]["headers"]
    assert actual.keys() == headers["properties"].keys() - {"tracestate"}
    jsonschema.Draft202012Validator(headers).validate(actual)
    for entry in catalogue_entries():
        assert messages[entry.name]["traits"] == [{"$ref": "#/components/messageTraits/envelope"}]
        replies = document["operations"][entry.name].get("reply", {}).get("messages", [])
        names = [one["$ref"].rpartition("/")[2] for one in replies]
        assert names == ([entry.reply_type.__name__, "Refused"] if entry.reply_type else []), entry.name
    assert messages["Refused"]["headers"]["required"] == ["fedbus-refused"]


def envelope_headers() -> dict[str, str]:
    message = next(iter(EXAMPLES.values()))
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    return make_envelope(
        message, source="fedbus/dev/some-agent/server", trace=trace, cause="01957f2c"
    ).headers()


def test_the_asyncapi_page_is_valid_asyncapi() -> None:
    document = json.loads(PAGES["asyncapi.yaml"]().partition("\n")[2])
    official = json.loads(ASYNCAPI.read_text())
    jsonschema.Draft7Validator(official).validate(document)


@pytest.mark.parametrize("body", EVERY_BODY, ids=lambda body: type(body).__name__)
def test_an_example_is_valid_by_its_schema(body: Body) -> None:
    schema = body_schema(type(body))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(body.model_dump_json()))


def test_every_schema_file_belongs_to_a_message_or_reply() -> None:
    assert {f"schemas/{file.name}" for file in (DOCS / "schemas").iterdir()} <= set(PAGES)
