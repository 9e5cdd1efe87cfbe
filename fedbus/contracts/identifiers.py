"""Ids of federations, clients, tasks and runs.

An id is one token of NATS subjects and a part of file names. Characters with a meaning in either are not
allowed: a client with the id ``*`` would receive the commands of all clients.
"""

import re
from typing import Annotated, NewType, TypeAlias

from pydantic import StringConstraints

ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"

FederationId = NewType("FederationId", str)
ClientId = NewType("ClientId", str)
TaskId = NewType("TaskId", str)
RunId = NewType("RunId", str)

Id: TypeAlias = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Sha256: TypeAlias = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]

_ID = re.compile(ID_PATTERN)


class BadId(ValueError):
    """A text is not a valid id."""

    def __init__(self, what: str, value: object) -> None:
        super().__init__(
            f"{value!r} is not a valid {what} id: use 1 to 63 lower-case letters, digits and hyphens, "
            "starting with a letter or digit"
        )
        self.what = what
        self.value = value


def check_id(what: str, value: str) -> str:
    """Return *value* if it is a valid id of a *what*; raises BadId otherwise."""
    if not _ID.fullmatch(value):
        raise BadId(what, value)
    return value


def client_id(value: str) -> ClientId:
    return ClientId(check_id("client", value))


def task_id(value: str) -> TaskId:
    return TaskId(check_id("task", value))


def federation_id(value: str) -> FederationId:
    return FederationId(check_id("federation", value))


def run_id(task: TaskId, number: int) -> RunId:
    """Return the id of the *number*-th run of *task*, counted from 1: ``mnist-1``."""
    return RunId(check_id("run", f"{task}-{number}"))
