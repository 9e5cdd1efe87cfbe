"""What classes say of themselves: their docstrings, their fields, and what stands under each of these."""

import ast
import inspect
import json
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class FieldEntry:
    name: str
    type: str
    default: str
    meaning: str


def docstring_of(kind: type[BaseModel]) -> str:
    """The docstring of *kind*, as one paragraph."""
    return " ".join((kind.__doc__ or "").split())


def field_entries(kind: type[BaseModel]) -> list[FieldEntry]:
    return [
        FieldEntry(
            field.serialization_alias or name,
            _format_type(field.annotation),
            "" if field.is_required() else to_json_text(field.get_default(call_default_factory=True)),
            _field_docstrings(kind).get(name, ""),
        )
        for name, field in kind.model_fields.items()
        if not field.exclude
    ]


@cache
def _field_docstrings(kind: type[BaseModel]) -> dict[str, str]:
    """What stands under each field of *kind* and of the classes above it: pydantic would read it at each start."""
    found: dict[str, str] = {}
    ours = [one for one in kind.__mro__ if one.__module__.startswith("fedbus.")]
    for one in reversed(ours):
        tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _format_type(annotation: Any) -> str:
    text = inspect.formatannotation(annotation).replace("NoneType", "None")
    for prefix in ("fedbus.contracts.", "typing.", "datetime."):
        text = text.replace(prefix, "")
    words = [
        word.rpartition(".")[2] if "." in word and "..." not in word else word for word in text.split(" ")
    ]
    return " ".join(words)


def to_json_text(default: Any) -> str:
    if isinstance(default, BaseModel):
        return type(default).__name__ + "()"
    return json.dumps(default, default=str)
