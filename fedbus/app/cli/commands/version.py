"""`fedbus version`: version information for bug reports."""

from fedbus.app.diagnostics.versions import installed_versions
from fedbus.app.terminal import output


def version(*, json: output.JsonOption = False) -> None:
    """Print version information for bug reports."""
    found = installed_versions()
    if json:
        output.print_json(found)
    else:
        for name, number in found.items():
            print(f"{name:<12} {number}")
