"""The kind of a refusal, and the two booleans that encode it."""

import pytest

from fedbus.contracts.envelope import decode_body, pack, unpack
from fedbus.contracts.message import Body, RefusalKind, Refused

WIRE = {
    RefusalKind.CALLER: {"passing": False, "blameless": False},
    RefusalKind.RETRYABLE: {"passing": True, "blameless": True},
    RefusalKind.NEEDS_OPERATOR: {"passing": False, "blameless": True},
}


@pytest.mark.parametrize("kind", RefusalKind)
def test_a_kind_survives_its_encoding_as_two_booleans(kind: RefusalKind) -> None:
    refused = Refused(reason="not now", kind=kind)
    assert unpack(pack(refused)) == {"reason": "not now", **WIRE[kind]}
    assert decode_body(Refused, pack(refused)) == refused


@pytest.mark.parametrize(
    ("wire", "kind"),
    [
        ({}, RefusalKind.CALLER),
        ({"passing": True}, RefusalKind.RETRYABLE),
        ({"passing": True, "blameless": False}, RefusalKind.RETRYABLE),
        ({"blameless": True}, RefusalKind.NEEDS_OPERATOR),
    ],
)
def test_the_refusal_of_an_older_sender_has_a_kind(wire: dict[str, bool], kind: RefusalKind) -> None:
    assert Refused.model_validate({"reason": "no", **wire}).kind is kind


def test_without_a_kind_a_refusal_blames_the_caller() -> None:
    refused: Body = Refused(reason="no such run")
    assert isinstance(refused, Refused)
    assert refused.kind is RefusalKind.CALLER
