"""Syntax check of a task's package requirements."""

from packaging.requirements import InvalidRequirement, Requirement


def problem_with(requirement: str) -> str | None:
    """Return why *requirement* is not a valid package requirement, or None if it is."""
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement as error:
        return str(error).splitlines()[0]
    return "name a package and its versions, not a URL" if parsed.url else None
