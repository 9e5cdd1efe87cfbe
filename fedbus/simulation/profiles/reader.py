"""Reads profiles: a YAML file, or a built-in profile by name, with values for its parameters.

load_profile("delay-study")
load_profile("delay-study:delay-s=4,probability=0.6")
load_profile("my-profile.yaml")
"""

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from fedbus.simulation.profiles.errors import ProfileError, ProfileMissing
from fedbus.simulation.profiles.problems import Keys, Lines, describe_problems, find_line, join_keys
from fedbus.simulation.profiles.schema import Profile

MAX_PROFILE_BYTES: Final = 1_000_000
MAX_PROFILE_NODES: Final = 100_000
"""The limit of values in a profile, with those that YAML aliases repeat."""
_SUFFIXES: Final = (".yaml", ".yml")
_PARAMETER: Final = re.compile(r"\$([A-Za-z0-9-]+)")


def load_profile(source: str | Path, values: Mapping[str, bool | float | str] | None = None) -> Profile:
    """Read the profile *source*: a file, or the name of a built-in profile, each with values for its parameters.

    *values* are further values for parameters.

    Raises:
        ProfileMissing: there is no such file or built-in profile.
        ProfileError: the profile is invalid.

    """
    path, settings = _split_source(str(source))
    text, name = _read_text(path)
    return parse_profile(text, name, {**settings, **(values or {})})


def builtin_profiles() -> list[str]:
    """Return the names of the built-in profiles, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _builtin_folder().iterdir()
        if entry.name.endswith(".yaml")
    )


def profile_text(source: str) -> str:
    """Return the YAML text of a profile.

    Raises:
        ProfileMissing: there is no such file or built-in profile.

    """
    return _read_text(_split_source(source)[0])[0]


def parse_profile(text: str, name: str, values: Mapping[str, bool | float | str] | None = None) -> Profile:
    """Parse the YAML *text* of the file *name* with values for its parameters.

    Raises:
        ProfileError: the profile is invalid.

    """
    lines = _compose(text, name)
    document = yaml.safe_load(text)
    if not isinstance(document, dict):
        raise ProfileError(
            f"{name}: a profile is a mapping with the key `groups`, not {_kind_of(document)}. "
            "An example: fedbus profile show mobile"
        )
    document = _substitute(document, _choose_values(document, name, values or {}), name, lines)
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        raise ProfileError(describe_problems(error, document, name, lines)) from None


# --- sources ------------------------------------------------------------------------------------


def _split_source(source: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:key=value,key=value``.

    Raises:
        ProfileError: the part after the colon has another form.

    """
    path, colon, settings = source.rpartition(":")
    if not colon or ("=" not in settings and Path(source).is_file()):
        return source, {}
    values = {}
    for setting in settings.split(","):
        key, equals, value = setting.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ProfileError(
                f"{source!r}: {setting!r} is not a parameter. Write {path}:key=value,key=value"
            )
        values[key.strip()] = _parse_scalar(value.strip())
    return path, values


def _parse_scalar(text: str) -> object:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _read_text(source: str) -> tuple[str, str]:
    """Return the text, and the name for errors."""
    if source in builtin_profiles():
        return _builtin_folder().joinpath(f"{source}.yaml").read_text(encoding="utf-8"), source
    path = Path(source)
    if path.suffix not in _SUFFIXES and len(path.parts) <= 1 and not path.is_file():
        names = builtin_profiles()
        close = difflib.get_close_matches(source, names, n=1)
        raise ProfileMissing(
            f"there is no built-in profile {source!r}, and no such file. "
            + (f"Did you mean {close[0]!r}? " if close else "")
            + f"Built-in: {', '.join(names)}. A file ends with .yaml"
        )
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ProfileError(f"{source}: the file is too large (limit {MAX_PROFILE_BYTES} bytes)")
        return path.read_text(encoding="utf-8"), source
    except FileNotFoundError:
        raise ProfileMissing(f"there is no profile {source}") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{source}: the file is not UTF-8 text") from None
    except OSError as error:
        raise ProfileError(f"{source}: cannot be read: {error.strerror}") from None


def _builtin_folder() -> Any:  # a Traversable, whose module differs between versions of Python
    return resources.files(__package__).joinpath("builtin")


# --- parameters ---------------------------------------------------------------------------------


def _choose_values(document: Mapping[object, object], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each parameter."""
    declared = document.get("parameters") or {}
    if not isinstance(declared, dict):
        return {}  # the schema reports it
    parameters = {str(key): value for key, value in declared.items()}
    for key in values:
        if key not in parameters:
            valid = ", ".join(parameters) or "none"
            raise ProfileError(f"{name}: there is no parameter `{key}`. Its parameters are: {valid}")
    return parameters | dict(values)


def _substitute(document: Any, values: Mapping[str, Any], name: str, lines: Lines) -> Any:
    """Replace ``$name`` by the value of the parameter."""

    def replace(node: Any, keys: Keys) -> Any:
        if isinstance(node, dict):
            return {key: replace(value, (*keys, str(key))) for key, value in node.items()}
        if isinstance(node, list):
            return [replace(value, (*keys, index)) for index, value in enumerate(node)]
        match = _PARAMETER.fullmatch(node) if isinstance(node, str) else None
        if match is None:
            return node
        if match[1] not in values:
            place = f"{name}:{find_line(lines, keys)}: {join_keys(keys)}"
            raise ProfileError(f"{place}: there is no parameter `{match[1]}`. Add it to `parameters`")
        return values[match[1]]

    return {
        key: value if key in {"parameters", "description"} else replace(value, (str(key),))
        for key, value in document.items()
    }


# --- YAML ---------------------------------------------------------------------------------------


def _compose(text: str, name: str) -> dict[Keys, int]:
    """Return the line of each key of the document. Raises ProfileError for bad YAML and repeated keys."""
    lines: dict[Keys, int] = {}
    count = 0

    def visit(node: yaml.Node, keys: Keys) -> None:
        nonlocal count
        count += 1
        if count > MAX_PROFILE_NODES:
            raise ProfileError(f"{name}: the profile has too many values (limit {MAX_PROFILE_NODES})")
        lines.setdefault(keys, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in names and key.value != "<<":
                    raise ProfileError(f"{name}:{line}: {join_keys((*keys, key.value))}: the key is repeated")
                names.add(str(key.value))
                lines[*keys, str(key.value)] = line
                visit(value, (*keys, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                visit(item, (*keys, index))

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            visit(root, ())
        yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ProfileError(f"{name}:{line}: the file is not valid YAML: {what}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ProfileError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProfileError(f"{name}: the file is not valid YAML: {reason}") from None
    return lines


def _kind_of(value: object) -> str:
    return {type(None): "an empty file", list: "a list", str: "text"}.get(type(value), repr(value))
