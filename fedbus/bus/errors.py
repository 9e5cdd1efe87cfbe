"""Exceptions of the bus that a caller can handle."""

from fedbus.contracts.message import RefusalKind


class BusError(Exception):
    """Base class of bus failures; the text names the cause and the remedy."""


class BusUnreachable(BusError):
    """No nats-server responds at the address."""

    def __init__(self, url: str, reason: object) -> None:
        super().__init__(f"no nats-server at {url}: {reason}. Start one (fedbus up) or set FEDBUS_NATS_URL")
        self.url = url


class InvalidCredentialsFile(BusError):
    """The credentials or CA file is invalid."""


class AccessDenied(BusError):
    """The NATS server rejected the connection, or its TLS certificate failed verification.

    Reconnecting cannot succeed: an operator must correct the credentials or the certificate.
    """

    def __init__(self, url: str, reason: str, advice: str) -> None:
        super().__init__(f"NATS server {url} rejected the connection: {reason}. {advice}")
        self.url = url
        self.reason = reason
        self.advice = advice


class PermissionDenied(BusError):
    """The permissions of the authenticated user do not allow the action."""

    def __init__(self, what: str) -> None:
        super().__init__(f"permission denied: {what}. See docs/security.md for the permissions of each role")
        self.what = what


class FederationNotFound(BusError):
    """The NATS server has no stream of the federation."""

    def __init__(self, fed: str) -> None:
        super().__init__(
            f"federation {fed} not found on this NATS server. Start its server side (fedbus up), "
            "or set FEDBUS_FEDERATION or FEDBUS_NATS_URL"
        )
        self.fed = fed


class BusClosed(BusError):
    """The connection is closed for good: rejected, or closed from outside. The process must be restarted."""


class NoResponse(BusError):
    """No agent serves the request, or its reply did not arrive in time."""

    def __init__(self, message_name: str, server: str, reason: str) -> None:
        super().__init__(f"no reply to {message_name}: {reason}. Check that the {server} is running")
        self.message_name = message_name
        self.server = server


class RequestRefused(BusError):
    """The reply is a refusal; *kind* names who can resolve it."""

    def __init__(self, message_name: str, reason: str, *, kind: RefusalKind = RefusalKind.CALLER) -> None:
        super().__init__(reason)
        self.message_name = message_name
        self.reason = reason
        self.kind = kind


class PublishRefused(BusError):
    """The event stream rejected the message."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"the stream rejected the message on {subject}: {reason}")
        self.subject = subject


class StaleOwner(BusError):
    """Another owner has published a transition of this entity; this agent must exit."""

    def __init__(self, kind: str, key: str) -> None:
        super().__init__(
            f"another owner changed {kind} {key}: two agents with the same identity are running. "
            "This one exits; stop one of the two"
        )
        self.kind = kind
        self.key = key


class LeaseLost(BusError):
    """The lease is lost; this agent must stop acting."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"lease {subject} lost: another agent took it over, or it expired")
        self.subject = subject
