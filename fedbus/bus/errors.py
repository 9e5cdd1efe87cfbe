"""What a caller of the bus can do something about."""

from fedbus.contracts.message import RefusalKind


class BusError(Exception):
    """Something the bus could not do; the text says what to do about it."""


class BusUnreachable(BusError):
    """No nats-server answers at the address."""

    def __init__(self, url: str, reason: object) -> None:
        super().__init__(f"no nats-server at {url}: {reason}. Start one (fedbus up) or set FEDBUS_NATS_URL")
        self.url = url


class InvalidCredentialsFile(BusError):
    """The files that say who we are, or whom to believe, are not what they should be."""


class AccessDenied(BusError):
    """The bus is there and will not have us, or we do not believe that it is the bus.

    To come again changes nothing: a person must mend it.
    """

    def __init__(self, url: str, reason: str, advice: str) -> None:
        super().__init__(f"{url} will not have us: {reason}. {advice}")
        self.url = url
        self.reason = reason
        self.advice = advice


class PermissionDenied(BusError):
    """The bus knows us, and does not let us do this."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the bus does not permit us to {what}: see docs/security.md for what each role may")
        self.what = what


class FederationNotFound(BusError):
    """The bus is there, and nothing of the federation on it."""

    def __init__(self, fed: str) -> None:
        super().__init__(
            f"federation {fed} has nothing on this bus yet: start its server side (fedbus up), "
            "or set FEDBUS_FEDERATION or FEDBUS_NATS_URL"
        )
        self.fed = fed


class BusClosed(BusError):
    """The connection is gone for good: refused, or closed from outside. The process should end and be started anew."""


class NoResponse(BusError):
    """Nobody serves the request, or whoever does was too slow."""

    def __init__(self, word: str, server: str, reason: str) -> None:
        super().__init__(f"no answer to {word}: {reason}. Is the {server} running?")
        self.word = word
        self.server = server


class RequestRefused(BusError):
    """The answer is a refusal; *kind* tells who can do something about it."""

    def __init__(self, word: str, reason: str, *, kind: RefusalKind = RefusalKind.CALLER) -> None:
        super().__init__(reason)
        self.word = word
        self.reason = reason
        self.kind = kind


class PublishRefused(BusError):
    """The event stream would not take the message."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"the stream refused what was said on {subject}: {reason}")
        self.subject = subject


class StaleOwner(BusError):
    """Somebody else has moved this thing: a second owner runs, and this one must end."""

    def __init__(self, kind: str, thing: str) -> None:
        super().__init__(
            f"{kind} {thing} was moved by another owner: two agents with one identity are running, and this one ends"
        )
        self.kind = kind
        self.thing = thing


class LeaseLost(BusError):
    """Another agent of the same kind has taken over: this one may act no more."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"the lease {subject} was lost: another holds it, or nobody does")
        self.subject = subject
