"""Pages of the documentation that are written from the tables: ``python -m fedbus.app.docs_generator.pages docs``.

    docs/events.md        every kind of message: between whom, where, with which fields, an example
    docs/lifecycles.md    every lifecycle as a diagram, with its owner and what its states wait for
    docs/permissions.md   what each role may publish and subscribe to
    docs/task-keys.md     every key of a task's table, with its default
    docs/asyncapi.yaml    the same messages for programs, as AsyncAPI 3
    docs/schemas/*.json   the JSON Schema of each message's body, and of each answer's

A test says that the pages in the repository are what the tables say.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from fedbus.app.docs_generator.model_docs import docstring_of, field_entries
from fedbus.app.docs_generator.permissions_page import render_permissions_page
from fedbus.app.docs_generator.task_keys_page import task_keys_page
from fedbus.contracts import catalogue as tables
from fedbus.contracts import subjects
from fedbus.contracts.envelope import CAUSATION_HEADER, CONTENT_TYPE, MAX_EVENT_BYTES, SPEC_VERSION
from fedbus.contracts.examples import EXAMPLES, REPLIES
from fedbus.contracts.identifiers import ID_PATTERN, FederationId
from fedbus.contracts.lifecycle import AnyLifecycle
from fedbus.contracts.message import REFUSED_HEADER, Body, Family, Message, Refused, Request, type_name
from fedbus.contracts.transition import LIFECYCLES, Transition

ANY_FEDERATION: Final = FederationId("<fed>")
REPLY_CHANNEL: Final = "answers"
FAMILY_TITLES: Final = {
    Family.SVC: "Requests to the server side",
    Family.SRV: "Between the agents of the server side",
    Family.CAST: "From the server side to all clients",
    Family.CMD: "From the server side to one client",
    Family.CLIENT: "From one client to the server side",
    Family.LOCAL: "Between the agents of one client",
    Family.LIFE: "What has become of everything",
}
ENVELOPE_TEXT: Final = (
    "Every message travels in an envelope: CloudEvents 1.0 attributes as `ce-…` NATS headers, among them the id of "
    "the message that led to it (`ce-causationid`, where there was one), the trace in "
    f"`traceparent`, the body as msgpack (at most {MAX_EVENT_BYTES // 1024} KiB; what is larger travels as a "
    "blob). See it on a running bus with `fedbus events tail`, or with the NATS command line:"
)
RULES_TEXT: Final = (
    f"`<fed>` is the federation, `<thing>` a task, a run, or `<client>.<task>`. Ids match `{ID_PATTERN}`. "
    "Fields are only ever added, with a default; nothing is renamed or retyped inside a version."
)
LOG_IS_STATE_TEXT: Final = (
    "A transition is one message on `fedbus.<fed>.life.<kind>.<thing>`, and the last one is the state. It is "
    "taken only if nobody has moved the thing since, so there is never a second owner."
)
GENERATED_NOTE: Final = "Written from the tables in `fedbus/contracts` by `make docs`; do not edit."


@dataclass(frozen=True)
class CatalogueEntry:
    """What the catalogue says of one kind of message."""

    kind: type[Message]

    @property
    def word(self) -> str:
        return self.kind.word

    @property
    def subject(self) -> str:
        if self.kind is Transition:
            return subjects.lifecycle(ANY_FEDERATION, "<kind>", "<thing>")
        return subjects.wildcard_for(ANY_FEDERATION, self.kind, client="<client>", task="<task>")

    @property
    def said_by(self) -> str:
        if self.kind is Transition:
            return "the owner of the lifecycle"
        return next(agent for agent, said in tables.PUBLISHES.items() if self.kind in said)

    @property
    def heard_by(self) -> tuple[str, ...]:
        if issubclass(self.kind, Request):
            return (self.kind.server,)
        if self.kind is Transition:
            return tuple(tables.FOLLOWS_LIFECYCLES)
        return tuple(agent for agent, heard in tables.SUBSCRIBES.items() if self.kind in heard)

    @property
    def gist(self) -> str:
        """The first sentence of what the class says of itself."""
        return docstring_of(self.kind).split(". ")[0].split(": ")[0].rstrip(".")

    @property
    def answer(self) -> type[Body] | None:
        return self.kind.answer if issubclass(self.kind, Request) else None

    def as_facts(self) -> dict[str, Any]:
        return {
            "word": self.word,
            "family": str(self.kind.family),
            "type": type_name(self.kind),
            "subject": self.subject,
            "said_by": self.said_by,
            "heard_by": list(self.heard_by),
            "durable": self.kind.durable,
            "answer": self.answer.__name__ if self.answer else None,
            "meaning": docstring_of(self.kind),
            "fields": [vars(field) for field in field_entries(self.kind)],
            "example": example_of(self.kind),
        }


def catalogue_entries() -> list[CatalogueEntry]:
    """Every kind of message, by family."""
    order = list(FAMILY_TITLES)
    return sorted(
        (CatalogueEntry(kind) for kind in tables.MESSAGES), key=lambda entry: order.index(entry.kind.family)
    )


def example_of(kind: type[Message]) -> Any:
    return json.loads(EXAMPLES[kind].model_dump_json())


# --- docs/events.md --------------------------------------------------------------------------------


def events_page() -> str:
    lines = [
        "# Events, commands and requests",
        "",
        GENERATED_NOTE,
        "",
        ENVELOPE_TEXT,
        "",
        "    nats sub 'fedbus.>' --translate 'fedbus events decode'",
        "",
        RULES_TEXT,
        "",
        "| word | says | subject | said by | heard by |",
        "|---|---|---|---|---|",
    ]
    entries = catalogue_entries()
    lines += [
        f"| [`{one.word}`](#{one.word}) | {one.gist} | `{one.subject}` | {one.said_by} | {_subscribers_text(one)} |"
        for one in entries
    ]
    for family, title in FAMILY_TITLES.items():
        lines += ["", f"## {title}"]
        for one in entries:
            if one.kind.family is family:
                lines += _section(one)
    lines += ["", "## Parts of messages", ""]
    for part in _body_types():
        lines += [f"### {part.__name__}", "", docstring_of(part), "", *_field_table(part)]
    return "\n".join(lines).rstrip() + "\n"


def _subscribers_text(entry: CatalogueEntry) -> str:
    return ", ".join(entry.heard_by) or "whoever listens"


def _retention_text(kind: type[Message]) -> str:
    return "the last of each device is kept" if kind.keeps_last_value else "not kept"


def _section(entry: CatalogueEntry) -> list[str]:
    kept = "kept in the stream" if entry.kind.durable else _retention_text(entry.kind)
    lines = [
        "",
        f"### {entry.word}",
        "",
        docstring_of(entry.kind),
        "",
        f"- subject: `{entry.subject}`",
        f"- type: `{type_name(entry.kind)}`, {kept}",
        f"- said by: {entry.said_by}",
        f"- heard by: {_subscribers_text(entry)}",
        "",
        *_field_table(entry.kind),
        "```json",
        json.dumps(example_of(entry.kind), indent=2),
        "```",
    ]
    if entry.answer:
        lines += ["", f"Answered with `{entry.answer.__name__}`, or `Refused` and the reason:", ""]
        lines += ["```json", REPLIES[entry.answer].model_dump_json(indent=2), "```"]
    return lines


def _field_table(kind: type[BaseModel]) -> list[str]:
    if not kind.model_fields:
        return []
    rows = [
        f"| `{one.name}` | `{one.type.replace('|', chr(92) + '|')}` | {f'`{one.default}`' if one.default else ''} "
        f"| {one.meaning} |"
        for one in field_entries(kind)
    ]
    return ["| field | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def _body_types() -> list[type[Body]]:
    """The bodies that fields and answers are made of."""
    found: dict[str, type[Body]] = {}

    def look_into(kind: type[BaseModel]) -> None:
        for field in kind.model_fields.values():
            for part in _bodies_in(field.annotation):
                if part.__name__ not in found:
                    found[part.__name__] = part
                    look_into(part)

    for kind in tables.MESSAGES:
        look_into(kind)
        if issubclass(kind, Request):
            found[kind.answer.__name__] = kind.answer
            look_into(kind.answer)
    return sorted(
        (part for part in found.values() if part not in tables.MESSAGES), key=lambda one: one.__name__
    )


def _bodies_in(annotation: Any) -> list[type[Body]]:
    if isinstance(annotation, type) and issubclass(annotation, Body):
        return [annotation]
    return [body for inner in getattr(annotation, "__args__", ()) for body in _bodies_in(inner)]


# --- docs/lifecycles.md ------------------------------------------------------------------------------


def lifecycles_page() -> str:
    lines = [
        "# Lifecycles",
        "",
        GENERATED_NOTE,
        "",
        LOG_IS_STATE_TEXT,
    ]
    for lifecycle in LIFECYCLES.values():
        lines += _lifecycle(lifecycle)
    return "\n".join(lines) + "\n"


def _lifecycle(lifecycle: AnyLifecycle) -> list[str]:
    subject = subjects.lifecycle(ANY_FEDERATION, lifecycle.kind, KEY_PATTERNS[lifecycle.kind])
    lines = [
        "",
        f"## {lifecycle.kind}",
        "",
        f"Moved by the {lifecycle.owner} alone, on `{subject}`.",
        "",
        "```mermaid",
        lifecycle.mermaid().rstrip(),
        "```",
    ]
    if lifecycle.waits:
        lines += ["", "| state | waits for | no longer than |", "|---|---|---|"]
        lines += [
            f"| {state} | {wait.waiting_for} | {wait.deadline} |" for state, wait in lifecycle.waits.items()
        ]
    return lines


KEY_PATTERNS: Final = {
    "server": "<task>",
    "code": "<task>",
    "schedule": "<task>",
    "run": "<run>",
    "client": "<client>.<task>",
    "fl_client": "<client>.<task>",
    "inference": "<client>.<task>",
}


# --- docs/asyncapi.yaml ------------------------------------------------------------------------------


def asyncapi_page() -> str:
    """The catalogue as AsyncAPI 3. JSON is YAML, and needs no library."""
    entries = catalogue_entries()
    answers: list[type[Body]] = [*(one.answer for one in entries if one.answer), Refused]
    schemas: dict[str, Any] = {}
    document = {
        "asyncapi": "3.0.0",
        "info": {"title": "fedbus", "version": "1", "description": f"Events over NATS. {GENERATED_NOTE}"},
        "defaultContentType": CONTENT_TYPE,
        "channels": {one.word: _channel(one) for one in entries} | {REPLY_CHANNEL: _answers_channel(answers)},
        "operations": {one.word: _operation(one) for one in entries},
        "components": {
            "messages": {one.word: _message(one, schemas) for one in entries}
            | {kind.__name__: _answer(kind, schemas) for kind in answers},
            "messageTraits": {"envelope": {"headers": _headers()}},
            "schemas": schemas,
        },
    }
    return f"# {GENERATED_NOTE}\n{json.dumps(document, indent=1)}\n"


def _channel(entry: CatalogueEntry) -> dict[str, Any]:
    address = entry.subject.replace("<", "{").replace(">", "}")
    names = [part[1:-1] for part in address.split(".") if part.startswith("{")]
    return {
        "address": address,
        "parameters": {name: {} for name in names},
        "messages": {entry.word: {"$ref": f"#/components/messages/{entry.word}"}},
    }


def _answers_channel(answers: list[type[Body]]) -> dict[str, Any]:
    return {
        "address": None,
        "description": "The reply subject that a request came with.",
        "messages": {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in answers},
    }


def _operation(entry: CatalogueEntry) -> dict[str, Any]:
    channel = {"$ref": f"#/channels/{entry.word}"}
    operation: dict[str, Any] = {"action": "send", "channel": channel, "summary": entry.gist}
    if entry.answer:
        answers = f"#/channels/{REPLY_CHANNEL}"
        operation["reply"] = {
            "channel": {"$ref": answers},
            "messages": [{"$ref": f"{answers}/messages/{kind.__name__}"} for kind in (entry.answer, Refused)],
        }
    return operation


def _message(entry: CatalogueEntry, schemas: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": type_name(entry.kind),
        "summary": docstring_of(entry.kind),
        "traits": [{"$ref": "#/components/messageTraits/envelope"}],
        "payload": _payload(entry.kind, schemas),
        "examples": [{"payload": example_of(entry.kind)}],
    }


def _answer(kind: type[Body], schemas: dict[str, Any]) -> dict[str, Any]:
    """An answer has no envelope: it goes to who asked; a no has a header that says so."""
    answer = {"name": kind.__name__, "summary": docstring_of(kind), "payload": _payload(kind, schemas)}
    if kind is Refused:
        return answer | {"headers": _header_schema({REFUSED_HEADER: "refused, or unreadable"})}
    return answer | {"examples": [{"payload": json.loads(REPLIES[kind].model_dump_json())}]}


def _headers() -> dict[str, Any]:
    optional = {
        CAUSATION_HEADER: "The id of the message that led to it",
        "traceparent": "W3C Trace Context",
        "tracestate": "W3C Trace Context",
    }
    always = {
        "ce-specversion": f"CloudEvents {SPEC_VERSION}",
        "ce-id": "Of this message alone",
        "ce-type": "Which message it is, and of which version: the name of the message here",
        "ce-source": "fedbus/<fed>/<agent>/<owner>: who says it",
        "ce-subject": "What it is about: the run and the round where there are any",
        "ce-time": "When it was said",
        "ce-datacontenttype": CONTENT_TYPE,
        "Nats-Msg-Id": "By which the stream drops a repeat: the same as ce-id",
    }
    return _header_schema(always, optional)


def _header_schema(always: dict[str, str], optional: dict[str, str] | None = None) -> dict[str, Any]:
    described = always | (optional or {})
    return {
        "type": "object",
        "required": list(always),
        "properties": {name: {"type": "string", "description": says} for name, says in described.items()},
    }


def _payload(kind: type[BaseModel], schemas: dict[str, Any]) -> Any:
    """The schema of a body; what it leans on goes to *schemas*, once."""
    schema = _without_discriminators(kind.model_json_schema(ref_template="#/components/schemas/{model}"))
    schemas.update(schema.pop("$defs", {}))
    return schema


def _without_discriminators(schema: Any) -> Any:
    """*schema* without OpenAPI's discriminators: the constants that each choice has say as much, to everybody."""
    match schema:
        case dict():
            return {
                name: _without_discriminators(item)
                for name, item in schema.items()
                if not _is_discriminator(name, item)
            }
        case list():
            return [_without_discriminators(item) for item in schema]
        case _:
            return schema


def _is_discriminator(name: str, item: object) -> bool:
    return name == "discriminator" and isinstance(item, dict) and "propertyName" in item


# --- docs/schemas ------------------------------------------------------------------------------------

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a body, as `fedbus events decode` shows it."""
    title = type_name(kind) if issubclass(kind, Message) else kind.__name__
    described: dict[str, Any] = _without_discriminators(kind.model_json_schema(mode="serialization"))
    return {"$schema": DIALECT} | described | {"title": title, "description": docstring_of(kind)}


def schema_page(kind: type[BaseModel]) -> str:
    return json.dumps(body_schema(kind), indent=1) + "\n"


def _schema_pages() -> dict[str, Callable[[], str]]:
    entries = catalogue_entries()
    named: dict[str, type[BaseModel]] = {one.word: one.kind for one in entries}
    named |= {one.answer.__name__: one.answer for one in entries if one.answer}
    named[Refused.__name__] = Refused
    return {f"schemas/{name}.json": partial(schema_page, kind) for name, kind in named.items()}


# --- writing -----------------------------------------------------------------------------------------

PAGES: Final[dict[str, Callable[[], str]]] = {
    "events.md": events_page,
    "lifecycles.md": lifecycles_page,
    "permissions.md": render_permissions_page,
    "task-keys.md": task_keys_page,
    "asyncapi.yaml": asyncapi_page,
    **_schema_pages(),
}


def main() -> None:
    (directory,) = map(Path, sys.argv[1:])
    (directory / "schemas").mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (directory / name).write_text(page())
        print(directory / name)


if __name__ == "__main__":
    main()
