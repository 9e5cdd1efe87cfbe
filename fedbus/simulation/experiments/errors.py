"""Errors of experiments."""


class ExperimentFailed(Exception):
    """The experiment cannot start or continue. The text has the cause and what to do."""


class InvalidExperiment(ExperimentFailed):
    """An option of the experiment is invalid."""


class ExperimentDataMissing(ExperimentFailed):
    """No data set of the experiment is in the data folder."""
