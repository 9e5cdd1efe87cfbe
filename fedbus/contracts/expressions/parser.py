"""Expressions with ``and``, ``or``, ``not`` and brackets, over leaves that each language spells itself.

    labelled >= 64 and (battery > 30 or charging)          a device's rule, see `rules`
    cron '0 3 * * *' or (labelled >= 64 on 3 clients)      a schedule's trigger, see `triggers`

Both are read by the parser here and never by Python's: nothing in them is ever executed. An
expression is bounded in length and depth, and whatever is wrong with it is one `BadExpression`
that points at the place.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

MAX_CHARS: Final = 1000
MAX_DEPTH: Final = 20
"""Brackets and nots inside each other."""

Leaf = TypeVar("Leaf")


@dataclass(frozen=True)
class And(Generic[Leaf]):
    parts: "tuple[Expression[Leaf], ...]"


@dataclass(frozen=True)
class Or(Generic[Leaf]):
    parts: "tuple[Expression[Leaf], ...]"


@dataclass(frozen=True)
class Not(Generic[Leaf]):
    part: "Expression[Leaf]"


Expression: TypeAlias = And[Leaf] | Or[Leaf] | Not[Leaf] | Leaf


class BadExpression(ValueError):
    """An expression that cannot be read: what is wrong, the expression, and a caret under the place."""

    def __init__(self, what: str, text: str, at: int) -> None:
        before = " ".join(text[:at].splitlines())
        line = " ".join(text.splitlines()) if "\n" in text else text
        super().__init__(f"{what}\n    {line}\n    {' ' * len(before)}^")
        self.what = what
        self.at = at


class Token(NamedTuple):
    kind: str
    """``name``, ``number``, ``text``, ``mark`` or ``end``."""
    text: str
    at: int


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>\d+(?:\.\d+)?(?:%|[A-Za-z]+)?(?![A-Za-z0-9_]))
      | (?P<name>[A-Za-z_][A-Za-z0-9_-]*)
      | (?P<text>'[^']*'|"[^"]*")
      | (?P<mark>\.\.|<=|>=|==|!=|<|>|\(|\))
    )""",
    re.VERBOSE,
)


class Tokens:
    """What is left of an expression, word by word."""

    def __init__(self, text: str, without_not: str = "") -> None:
        self.text = text
        self.no_not_reason = without_not
        if len(text) > MAX_CHARS:
            raise BadExpression(f"it has more than {MAX_CHARS} characters", text[:60], 0)
        self._tokens = self._tokenize()
        self._next = 0

    @property
    def current(self) -> Token:
        return self._tokens[self._next]

    def take(self) -> Token:
        token = self.current
        if token.kind != "end":
            self._next += 1
        return token

    def accept(self, *texts: str) -> bool:
        """Whether the next word is one of these; then it is taken."""
        if self.current.kind != "text" and self.current.text in texts:
            self.take()
            return True
        return False

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raise BadExpression, with the caret under the next word or under *at*."""
        raise BadExpression(what, self.text, self.current.at if at is None else at)

    def _tokenize(self) -> list[Token]:
        found, at, end = [], 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise BadExpression(f"{self.text[at]!r} has no meaning here", self.text, at)
            assert match.lastgroup is not None
            found.append(Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        return [*found, Token("end", "", end)]


def parse_expression(text: str, leaf: Callable[[Tokens], Leaf], *, without_not: str = "") -> Expression[Leaf]:
    """The expression in *text*, whose leaves *leaf* reads; raises BadExpression.

    *without_not*: why the language has no ``not``, where it has none.
    """
    tokens = Tokens(text, without_not)
    if tokens.current.kind == "end":
        tokens.fail("it is empty")
    found = _parse_or(tokens, leaf, 0)
    if tokens.current.kind != "end":
        tokens.fail(f"expected `and`, `or` or the end, not {tokens.current.text!r}")
    return found


def leaves(expression: Expression[Leaf]) -> list[Leaf]:
    """All leaves, from left to right."""
    match expression:
        case And(parts=parts) | Or(parts=parts):
            return [leaf for part in parts for leaf in leaves(part)]
        case Not(part=part):
            return leaves(part)
        case _:
            return [expression]


def _parse_or(tokens: Tokens, leaf: Callable[[Tokens], Leaf], depth: int) -> Expression[Leaf]:
    parts = [_parse_and(tokens, leaf, depth)]
    while tokens.accept("or"):
        parts.append(_parse_and(tokens, leaf, depth))
    return Or(tuple(parts)) if len(parts) > 1 else parts[0]


def _parse_and(tokens: Tokens, leaf: Callable[[Tokens], Leaf], depth: int) -> Expression[Leaf]:
    parts = [_parse_not(tokens, leaf, depth)]
    while tokens.accept("and"):
        parts.append(_parse_not(tokens, leaf, depth))
    return And(tuple(parts)) if len(parts) > 1 else parts[0]


def _parse_not(tokens: Tokens, leaf: Callable[[Tokens], Leaf], depth: int) -> Expression[Leaf]:
    if depth > MAX_DEPTH:
        tokens.fail(f"it is nested more than {MAX_DEPTH} deep")
    if tokens.current.text == "not" and tokens.no_not_reason:
        tokens.fail(tokens.no_not_reason)
    if tokens.accept("not"):
        return Not(_parse_not(tokens, leaf, depth + 1))
    opened = tokens.current.at
    if tokens.accept("("):
        inside = _parse_or(tokens, leaf, depth + 1)
        if not tokens.accept(")"):
            tokens.fail("this bracket is never closed", opened)
        return inside
    return leaf(tokens)
