"""Finds the subscriptions, consumers and streams whose subject matches that of a message."""

import functools
import re
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_TOKEN: Final = re.compile(r"[^\s.*>]+")


class InvalidMemorySubject(ValueError):
    """A subject that NATS would reject."""


@functools.lru_cache(maxsize=65536)
def check_subject(subject: str) -> None:
    """Check that a message can be published on *subject*.

    Raises:
        InvalidMemorySubject: A token is empty, or contains a wildcard or white space.

    """
    if not all(_TOKEN.fullmatch(token) for token in subject.split(".")):
        raise InvalidMemorySubject(
            f"cannot publish on {subject!r}: a token is empty, or contains a wildcard or white space"
        )


def _has_wildcard(pattern: str) -> bool:
    return "*" in pattern or ">" in pattern


class _Node(Generic[T]):
    __slots__ = ("children", "rest", "values")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.values: list[T] = []
        self.rest: list[T] = []
        """The values of patterns that end with ``>`` here."""


class SubjectIndex(Generic[T]):
    """Values by subject pattern; ``*`` matches one token, ``>`` one or more at the end."""

    def __init__(self) -> None:
        self._exact: dict[str, list[T]] = {}
        """The values of patterns without wildcards, which are most."""
        self._root: _Node[T] = _Node()

    def add(self, pattern: str, value: T) -> None:
        if not _has_wildcard(pattern):
            self._exact.setdefault(pattern, []).append(value)
            return
        *path, last = pattern.split(".")
        node = self._root
        for token in path:
            node = self._child(node, token)
        if last == ">":
            node.rest.append(value)
        else:
            self._child(node, last).values.append(value)

    def _child(self, node: _Node[T], token: str) -> _Node[T]:
        if (child := node.children.get(token)) is None:
            child = node.children[token] = _Node()
        return child

    def remove(self, pattern: str, value: T) -> None:
        """Remove *value*, which was added with the same *pattern*."""
        if _has_wildcard(pattern):
            self._remove_from_tree(pattern, value)
            return
        self._exact[pattern].remove(value)
        if not self._exact[pattern]:
            del self._exact[pattern]

    def has_exact(self, subject: str) -> bool:
        """Return whether a pattern without wildcards is *subject*."""
        return subject in self._exact

    def exact(self, subject: str) -> list[T]:
        """Return the values of the pattern *subject*, without those of patterns with wildcards."""
        return self._exact.get(subject, [])

    def _remove_from_tree(self, pattern: str, value: T) -> None:
        self._remove(self._root, pattern.split("."), value)

    def _remove(self, node: _Node[T], tokens: list[str], value: T) -> None:
        first, *rest = tokens
        if first == ">" and not rest:
            node.rest.remove(value)
            return
        child = node.children[first]
        if rest:
            self._remove(child, rest, value)
        else:
            child.values.remove(value)
        if not (child.children or child.values or child.rest):
            del node.children[first]

    def match(self, subject: str) -> list[T]:
        """Return the values of all patterns that match *subject*, those without wildcards first."""
        found = list(self._exact.get(subject, ()))
        self._match(self._root, subject.split("."), 0, found)
        return found

    def _match(self, node: _Node[T], tokens: list[str], at: int, found: list[T]) -> None:
        if at == len(tokens):
            found += node.values
            return
        found += node.rest
        children = node.children
        if (child := children.get(tokens[at])) is not None:
            self._match(child, tokens, at + 1, found)
        if (child := children.get("*")) is not None:
            self._match(child, tokens, at + 1, found)


def matching_subjects(subjects: Iterator[str], patterns: list[str]) -> Iterator[str]:
    """Return those of *subjects* that match one of *patterns*."""
    index: SubjectIndex[str] = SubjectIndex()
    for pattern in patterns:
        index.add(pattern, pattern)
    return (subject for subject in subjects if index.match(subject))
