"""`fedbus doctor` and `fedbus version`: what this machine has, and what it lacks."""

from typing import Annotated

import typer

from fedbus.app.failures import Failure
from fedbus.app.terminal import output


def doctor(
    *,
    json: output.AsJson = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs a bus.")] = False,
) -> None:
    """Check what this machine has and lacks, and say what to do about it."""
    from fedbus.app.diagnostics.doctor import examine
    from fedbus.app.settings import Settings
    from fedbus.app.terminal.progress_bar import working

    settings = Settings.from_environment()
    with working("looking at this machine" if offline else "looking at this machine and the bus"):
        findings = examine(settings, offline=offline)
    if json:
        output.as_json([finding.as_facts() for finding in findings])
    else:
        for finding in findings:
            output.console().print(finding.line())
    if ill := [finding for finding in findings if finding.is_ill]:
        raise Failure(f"{len(ill)} thing{'s' if len(ill) > 1 else ''} to mend")


def version(*, json: output.AsJson = False) -> None:
    """Print the versions that a report of an error should name."""
    from fedbus.app.diagnostics.doctor import versions

    found = versions()
    if json:
        output.as_json(found)
    else:
        for name, number in found.items():
            print(f"{name:<12} {number}")
