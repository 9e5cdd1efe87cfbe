"""Client selection: the clients with the highest scores, and those that have waited longest."""

from hypothesis import given
from hypothesis import strategies as st

from fedbus.learning.client_selection import MIN_FACTOR, ClientSelection

CLIENTS = [f"c{number}" for number in range(1, 7)]


def test_without_configuration_all_clients_train_unweighted() -> None:
    selection = ClientSelection()
    assert selection.choose(CLIENTS) == set(CLIENTS)
    assert selection.weight_factor("c1") == 1.0


def test_the_best_and_the_longest_waiting_clients_train() -> None:
    selection = ClientSelection(
        max_clients=3, explore=0.3, scores={"c1": 0.9, "c2": 0.8, "c3": 0.1, "c4": 0.1, "c5": 0.1, "c6": 0.1}
    )
    rounds = [selection.choose(CLIENTS) for _ in range(4)]
    assert all({"c1", "c2"} <= chosen for chosen in rounds)
    assert [min(chosen - {"c1", "c2"}) for chosen in rounds] == ["c3", "c4", "c5", "c6"]


def test_a_factor_is_the_score_and_never_zero() -> None:
    selection = ClientSelection(weights={"c1": 0.75, "c2": 0.0})
    assert [selection.weight_factor(client) for client in ("c1", "c2", "new")] == [0.75, MIN_FACTOR, 0.5]


@given(
    st.sets(st.sampled_from(CLIENTS), min_size=1),
    st.integers(1, 8),
    st.floats(0, 1),
    st.dictionaries(st.sampled_from(CLIENTS), st.floats(0, 1)),
)
def test_at_most_the_configured_number_of_clients_is_selected(
    available: set[str], most: int, explore: float, scores: dict[str, float]
) -> None:
    chosen = ClientSelection(max_clients=most, explore=explore, scores=scores).choose(available)
    assert chosen <= available
    assert len(chosen) == min(most, len(available))
