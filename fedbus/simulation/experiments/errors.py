"""Errors of experiments."""

from importlib.util import find_spec


class ExperimentFailed(Exception):
    """The experiment cannot start or continue. The text has the cause and what to do."""


def require_package(name: str, *, extra: str) -> None:
    """Check that the package *name* of the extra is installed, without importing it. Raises ExperimentFailed."""
    if find_spec(name) is None:
        raise ExperimentFailed(
            f"this experiment needs {name}, which is not installed. Install it: pip install 'fedbus[{extra}]'"
        )


class InvalidExperiment(ExperimentFailed):
    """An option of the experiment is invalid."""


class ExperimentDataMissing(ExperimentFailed):
    """No data set of the experiment is in the data folder."""
