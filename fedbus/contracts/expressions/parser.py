"""Parser of expressions with ``and``, ``or``, ``not`` and parentheses. Each language parses its own leaves.

    labelled >= 64 and (battery > 30 or charging)          a rule, see `eligibility_rule`
    cron '0 3 * * *' or (labelled >= 64 on 3 clients)      a trigger, see `trigger`

Python never evaluates an expression. Its length and depth are limited, and every error is a `BadExpression`
that points at the position.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

MAX_CHARS: Final = 1000
MAX_DEPTH: Final = 20
"""The limit for nested parentheses and nots."""

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
    """An expression is invalid. The text has the problem, the expression, and a caret below the position."""

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
    """The tokens of an expression that are not parsed yet."""

    def __init__(self, text: str, no_not_reason: str = "") -> None:
        self.text = text
        self.no_not_reason = no_not_reason
        if len(text) > MAX_CHARS:
            raise BadExpression(
                f"the expression has {len(text)} characters (limit {MAX_CHARS})", text[:60], 0
            )
        self._tokens = self._tokenize()
        self._next = 0

    @property
    def current(self) -> Token:
        return self._tokens[self._next]

    def advance(self) -> Token:
        token = self.current
        if token.kind != "end":
            self._next += 1
        return token

    def accept(self, *texts: str) -> bool:
        """Take the next token if it is one of *texts*; return whether it was."""
        if self.current.kind != "text" and self.current.text in texts:
            self.advance()
            return True
        return False

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raise BadExpression, with the caret below the next token or below *at*."""
        raise BadExpression(what, self.text, self.current.at if at is None else at)

    def _tokenize(self) -> list[Token]:
        found, at, end = [], 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise BadExpression(f"unexpected character {self.text[at]!r}", self.text, at)
            assert match.lastgroup is not None
            found.append(Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        return [*found, Token("end", "", end)]


def parse_expression(
    text: str, leaf: Callable[[Tokens], Leaf], *, no_not_reason: str = ""
) -> Expression[Leaf]:
    """Parse the expression in *text*; raises BadExpression.

    Args:
        text: The expression.
        leaf: Parses one leaf.
        no_not_reason: The error text for ``not``, if the language has no ``not``.

    """
    tokens = Tokens(text, no_not_reason)
    if tokens.current.kind == "end":
        tokens.fail("the expression is empty")
    found = _parse_or(tokens, leaf, 0)
    if tokens.current.kind != "end":
        tokens.fail(f"expected `and`, `or` or the end, not {tokens.current.text!r}")
    return found


def leaves(expression: Expression[Leaf]) -> list[Leaf]:
    """Return all leaves, from left to right."""
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
        tokens.fail(f"the expression is nested too deeply (limit {MAX_DEPTH})")
    if tokens.current.text == "not" and tokens.no_not_reason:
        tokens.fail(tokens.no_not_reason)
    if tokens.accept("not"):
        return Not(_parse_not(tokens, leaf, depth + 1))
    opened = tokens.current.at
    if tokens.accept("("):
        inside = _parse_or(tokens, leaf, depth + 1)
        if not tokens.accept(")"):
            tokens.fail("this parenthesis is not closed", opened)
        return inside
    return leaf(tokens)
