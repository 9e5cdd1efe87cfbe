"""What NATS does with subjects, in ten lines."""


def matches_subject(pattern: str, subject: str) -> bool:
    """Whether a subscription to *pattern* is sent what is published on *subject*."""
    wanted, said = pattern.split("."), subject.split(".")
    for position, token in enumerate(wanted):
        if token == ">":
            return len(said) > position
        if position >= len(said) or token not in ("*", said[position]):
            return False
    return len(wanted) == len(said)
