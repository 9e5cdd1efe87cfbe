"""Matching of subjects, as NATS does it."""


def matches_subject(pattern: str, subject: str) -> bool:
    """Whether a subscription to *pattern* receives messages on *subject*."""
    expected, actual = pattern.split("."), subject.split(".")
    for position, token in enumerate(expected):
        if token == ">":
            return len(actual) > position
        if position >= len(actual) or token not in ("*", actual[position]):
            return False
    return len(expected) == len(actual)
