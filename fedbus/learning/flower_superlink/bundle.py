"""The app bundle (FAB) that a SuperLink gives to its SuperNodes.

It has no code of the task: its ClientApp is that of the module `client_app`, which runs that of the
task's directory on the device. So each device runs the code version that fedbus has deployed, with its libraries.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Final

from fedbus.contracts.run import Scalar
from fedbus.learning.flower_superlink import client_app

PUBLISHER: Final = "fedbus"
CLIENT_APP: Final = f"{client_app.__name__}:app"
ZIP_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""A fixed date, so that equal contents have equal hashes."""


def build_bundle(name: str, config: Mapping[str, Scalar]) -> bytes:
    """Build the bundle of the task *name* with the run configuration *config*."""
    pyproject = "\n".join(
        (
            "[project]",
            f"name = {json.dumps(name)}",
            'version = "1.0.0"',
            "[tool.flwr.app]",
            f"publisher = {json.dumps(PUBLISHER)}",
            "[tool.flwr.app.components]",
            f"serverapp = {json.dumps(CLIENT_APP)}",  # Flower demands one; fedbus runs the task's own
            f"clientapp = {json.dumps(CLIENT_APP)}",
            "[tool.flwr.app.config]",
            to_toml(config),
        )
    ).encode()
    content = f"pyproject.toml,{hashlib.sha256(pyproject).hexdigest()},{len(pyproject) * 8}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in (("pyproject.toml", pyproject), (".info/CONTENT", content.encode())):
            archive.writestr(zipfile.ZipInfo(path, ZIP_DATE), data)
    return buffer.getvalue()


def to_toml(values: Mapping[str, Scalar]) -> str:
    """Return *values* as TOML, a line for each. A key with dots is one of nested tables, as Flower reads it."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in values.items())


def _key(key: str) -> str:
    return ".".join(json.dumps(part) for part in key.split("."))


def _value(value: Scalar) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value).replace("\x7f", "\\u007f")
        case _:
            return repr(value)
