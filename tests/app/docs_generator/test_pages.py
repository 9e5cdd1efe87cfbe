"""The pages in the repository are what the tables say."""

import json
from pathlib import Path

import jsonschema
import pytest

from fedbus.app.docs_generator.pages import (
    PAGES,
    body_schema,
    catalogue_entries,
    events_page,
    lifecycles_page,
)
from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.envelope import make_envelope
from fedbus.contracts.examples import EXAMPLES, REPLIES
from fedbus.contracts.message import Body
from fedbus.contracts.transition import LIFECYCLES

DOCS = Path(__file__).parents[3] / "docs"
ASYNCAPI = Path(__file__).with_name("asyncapi") / "3.0.0.json"
EVERY_BODY = [*EXAMPLES.values(), *REPLIES.values()]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_tables_say(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "the tables have moved on: make docs"


def test_every_message_is_on_the_page_with_each_of_its_fields() -> None:
    page = events_page()
    for kind in MESSAGES:
        section = page.partition(f"### {kind.word}\n")[2].partition("### ")[0]
        assert all(f"| `{field}` |" in section for field in kind.model_fields), kind.word


def test_a_field_is_explained_by_what_stands_under_it() -> None:
    assert "True if the trainer process ended without reporting a reason." in events_page()


def test_every_lifecycle_is_drawn() -> None:
    page = lifecycles_page()
    assert all(lifecycle.mermaid() in page for lifecycle in LIFECYCLES.values())


def test_every_reference_of_the_asyncapi_page_leads_somewhere() -> None:
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
    assert set(document["channels"]) == {entry.word for entry in catalogue_entries()} | {"answers"}


def test_the_asyncapi_page_tells_the_headers_of_each_message_and_what_each_request_is_answered_with() -> None:
    document = json.loads(PAGES["asyncapi.yaml"]().partition("\n")[2])
    messages, said = document["components"]["messages"], envelope_headers()
    headers = document["components"]["messageTraits"]["envelope"]["headers"]
    assert said.keys() == headers["properties"].keys() - {"tracestate"}
    jsonschema.Draft202012Validator(headers).validate(said)
    for entry in catalogue_entries():
        assert messages[entry.word]["traits"] == [{"$ref": "#/components/messageTraits/envelope"}]
        replies = document["operations"][entry.word].get("reply", {}).get("messages", [])
        told = [one["$ref"].rpartition("/")[2] for one in replies]
        assert told == ([entry.answer.__name__, "Refused"] if entry.answer else []), entry.word
    assert messages["Refused"]["headers"]["required"] == ["fedbus-refused"]


def envelope_headers() -> dict[str, str]:
    message = next(iter(EXAMPLES.values()))
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    return make_envelope(
        message, source="fedbus/dev/some-agent/server", trace=trace, cause="01957f2c"
    ).headers()


def test_the_asyncapi_page_is_asyncapi() -> None:
    document = json.loads(PAGES["asyncapi.yaml"]().partition("\n")[2])
    official = json.loads(ASYNCAPI.read_text())
    jsonschema.Draft7Validator(official).validate(document)


@pytest.mark.parametrize("body", EVERY_BODY, ids=lambda body: type(body).__name__)
def test_an_example_is_as_its_schema_says(body: Body) -> None:
    schema = body_schema(type(body))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(body.model_dump_json()))


def test_no_schema_is_left_of_a_word_that_nobody_says() -> None:
    assert {f"schemas/{file.name}" for file in (DOCS / "schemas").iterdir()} <= set(PAGES)
