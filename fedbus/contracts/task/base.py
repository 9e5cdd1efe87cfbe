"""The base class of a task's ``[tool.fedbus]`` tables."""

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints

ObjectReference: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$")
]
"""A function or class of the task's code: ``module:name``."""

ModuleName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
"""A module of the task's code: ``my_app.functions``."""


class ConfigSection(BaseModel):
    """A table of the task. Unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        serialize_by_alias=True,  # a child process parses the table that its parent has serialised
    )
