"""`fedbus doctor` and `fedbus version`: what this machine has, and what it lacks."""

from typing import Annotated

import typer

from fedbus.app import show
from fedbus.app.edge import Failure


def doctor(
    *,
    json: show.AsJson = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs a bus.")] = False,
) -> None:
    """Check what this machine has and lacks, and say what to do about it."""
    from fedbus.app.doctor import examine
    from fedbus.app.settings import Settings
    from fedbus.app.working import working

    settings = Settings.from_environment()
    with working("looking at this machine" if offline else "looking at this machine and the bus"):
        findings = examine(settings, offline=offline)
    if json:
        show.as_json([finding.as_facts() for finding in findings])
    else:
        for finding in findings:
            show.console().print(finding.line())
    if ill := [finding for finding in findings if finding.is_ill]:
        raise Failure(f"{len(ill)} thing{'s' if len(ill) > 1 else ''} to mend")


def version(*, json: show.AsJson = False) -> None:
    """Print the versions that a report of an error should name."""
    from fedbus.app.doctor import versions

    found = versions()
    if json:
        show.as_json(found)
    else:
        for name, number in found.items():
            print(f"{name:<12} {number}")
