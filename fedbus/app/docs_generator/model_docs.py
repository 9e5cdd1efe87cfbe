"""Documentation of pydantic models: the docstring of the class, and name, type, default and docstring of each field."""

import ast
import base64
import inspect
import json
import textwrap
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel


@dataclass(frozen=True)
class FieldEntry:
    name: str
    type: str
    default: str
    meaning: str


def docstring_of(kind: type[BaseModel]) -> str:
    """Return the docstring of *kind* as one paragraph."""
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
    """Return the docstrings of the fields of *kind* and its base classes.

    Pydantic's `use_attribute_docstrings` would read the sources at each start of a process.
    """
    docstrings: dict[str, str] = {}
    # The class of a type with arguments, `Request[RunStarted]`, has no source.
    with_source = (one for one in kind.__mro__ if one.__name__.isidentifier())
    classes = [one for one in with_source if one.__module__.startswith("fedbus.")]
    for one in reversed(classes):
        tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docstrings[name] = " ".join(text.split())
                case _:
                    pass
    return docstrings


def _format_type(annotation: Any) -> str:
    """Return a type as in the source, without module names and constraints."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _format_type(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_format_type, arguments))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_format_type, arguments))}]"
    if annotation is Ellipsis:
        return "..."
    return _TYPE_NAMES.get(annotation) or str(annotation.__name__)


_TYPE_NAMES: Final[dict[Any, str]] = {NoneType: "None", AwareDatetime: "datetime"}


def to_json_text(default: Any) -> str:
    if isinstance(default, BaseModel):
        return type(default).__name__ + "()"
    return json.dumps(default, default=_to_json_value)


def _to_json_value(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
