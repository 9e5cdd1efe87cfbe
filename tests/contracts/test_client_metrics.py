"""The metrics of a client: a message accepts any input and keeps a limited number of metrics."""

from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.client import RoundReply
from fedbus.contracts.client_metrics import MAX_METRICS, MAX_NAME_CHARS
from fedbus.contracts.envelope import decode_body, pack
from fedbus.contracts.examples import EXAMPLES


def reply_with(figures: dict[str, float]) -> RoundReply:
    example = EXAMPLES[RoundReply].model_dump()
    return RoundReply.model_validate(example | {"figures": figures})


@given(st.dictionaries(st.text(max_size=60), st.floats()))
def test_a_message_keeps_few_finite_metrics_of_any_input(
    figures: dict[str, float],
) -> None:
    reply = reply_with(figures)
    assert len(reply.figures) <= MAX_METRICS
    assert all(figures[name] == value for name, value in reply.figures.items())
    assert all(len(name) <= MAX_NAME_CHARS and name.isprintable() for name in reply.figures)
    assert decode_body(RoundReply, pack(reply)) == reply


def test_loss_and_accuracy_are_kept_among_too_many_metrics() -> None:
    many = {f"train_{letter}": 1.0 for letter in "abcdefghij"}
    metrics = reply_with(many | {"train_loss": 0.5, "train_accuracy": 0.75}).figures
    assert list(metrics)[:2] == ["train_accuracy", "train_loss"]
    assert len(metrics) == MAX_METRICS
