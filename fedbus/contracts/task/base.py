"""What every part of a task's ``[tool.fedbus]`` table has in common."""

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints

ObjectReference: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$")
]
"""A function or class of the task's code: ``module:name``."""


class ConfigSection(BaseModel):
    """Part of the table: a name it does not know is a mistake, and said to be one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        serialize_by_alias=True,  # a table that is handed to a process is read there as it was here
    )
