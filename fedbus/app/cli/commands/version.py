"""`fedbus version`: version information for bug reports."""

from fedbus.app.diagnostics.versions import installed_versions
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json


def version(*, json: output.JsonOption = False) -> None:
    """Print version information for bug reports."""
    versions = installed_versions()
    if json:
        print_json(versions)
    else:
        for name, number in versions.items():
            print(f"{name:<12} {number}")
