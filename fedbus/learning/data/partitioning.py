"""How a data set is divided among clients, as text: ``iid``, ``dirichlet:0.3``, ``classes:2+sizes:linear`` …"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from fedbus.learning.data.errors import InvalidPartitioning

ALLOWED: Final = (
    ("iid", "equal shares, chosen at random"),
    ("dirichlet:ALPHA", "label skew: a Dirichlet distribution for each class; 0.1 strong, 10 weak"),
    ("classes:K", "K classes a client, in shares of equal size"),
    ("sizes:linear", "sizes 1 : 2 : 3 : …"),
    ("sizes:square", "sizes 1 : 4 : 9 : …"),
    ("sizes:exponential", "sizes e : e² : e³ : …; only for few clients"),
    ("sizes:lognormal:SIGMA", "sizes drawn from a log-normal distribution; for many clients"),
    ("classes:K+sizes:…", "both: K classes a client, in shares of unequal size"),
)
"""The syntax of a partitioning, with descriptions."""

ALPHA_RANGE: Final = (0.001, 1e6)
SIGMA_RANGE: Final = (0.001, 10.0)


class SizeLaw(StrEnum):
    """How the numbers of samples of the clients relate to each other."""

    LINEAR = "linear"
    SQUARE = "square"
    EXPONENTIAL = "exponential"
    LOGNORMAL = "lognormal"


@dataclass(frozen=True)
class Partitioning:
    """A way to divide samples among clients; without any option set, equal shares chosen at random (IID)."""

    alpha: float | None = None
    """Concentration of the Dirichlet distribution: the smaller, the fewer classes a client has."""
    classes: int | None = None
    """Number of classes a client has, at least 1."""
    sizes: SizeLaw | None = None
    sigma: float | None = None
    """Standard deviation of the logarithm of the sizes; only for `SizeLaw.LOGNORMAL`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse *text*; `ALLOWED` has the syntax.

        Raises:
            InvalidPartitioning: the text is not valid; the message lists what is.

        """
        options: dict[str, object] = {}
        terms = [term.strip() for term in text.strip().lower().split("+")]
        for term in terms:
            for name, value in _parse_term(text, term).items():
                if name in options:
                    raise _invalid(text, f"{term.partition(':')[0]!r} occurs twice")
                options[name] = value
        if len(terms) > 1 and options.keys() - {"sigma"} != {"classes", "sizes"}:
            raise _invalid(text, "only classes and sizes can be combined")
        return cls(**options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the text that `parse` accepts."""
        terms = []
        if self.alpha is not None:
            terms.append(f"dirichlet:{_format_number(self.alpha)}")
        if self.classes is not None:
            terms.append(f"classes:{self.classes}")
        if self.sizes is not None:
            terms.append(
                f"sizes:{self.sizes}" + ("" if self.sigma is None else f":{_format_number(self.sigma)}")
            )
        return "+".join(terms) or "iid"


def describe_syntax() -> str:
    """Return the allowed texts in one line."""
    return ", ".join(syntax for syntax, _ in ALLOWED)


def _parse_term(text: str, term: str) -> dict[str, object]:
    kind, *arguments = term.split(":")
    match kind, arguments:
        case "iid", []:
            return {}
        case "dirichlet", [alpha]:
            return {"alpha": _number_in(ALPHA_RANGE, text, "ALPHA", alpha)}
        case "classes", [classes] if re.fullmatch(r"[1-9][0-9]{0,5}", classes):
            return {"classes": int(classes)}
        case "sizes", ["lognormal"]:
            return {"sizes": SizeLaw.LOGNORMAL, "sigma": 1.0}
        case "sizes", ["lognormal", sigma]:
            return {"sizes": SizeLaw.LOGNORMAL, "sigma": _number_in(SIGMA_RANGE, text, "SIGMA", sigma)}
        case "sizes", [law] if law in set(SizeLaw):
            return {"sizes": SizeLaw(law)}
        case _:
            raise _invalid(text, _TERM_PROBLEMS.get(kind, f"{term!r} is unknown"))


_TERM_PROBLEMS: Final = {
    "iid": "iid has no options",
    "dirichlet": "dirichlet needs one number, for example dirichlet:0.3",
    "classes": "classes needs a whole number above 0, for example classes:2",
    "sizes": "sizes needs one of the laws below, for example sizes:linear or sizes:lognormal:1",
}


def _number_in(limits: tuple[float, float], text: str, name: str, value: str) -> float:
    least, most = limits
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not least <= number <= most:
        raise _invalid(
            text, f"{name} must be a number from {_format_number(least)} to {_format_number(most)}"
        )
    return number


def _format_number(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def _invalid(text: str, reason: str) -> InvalidPartitioning:
    return InvalidPartitioning(f"invalid partitioning {text!r}: {reason}. Allowed are {describe_syntax()}")
