"""The numbers of rounds of an app that trains once, twice, or resumes."""

from fedbus.learning.flower.round_counter import RoundCounter


def train(counter: RoundCounter, rounds: int) -> list[tuple[int, int]]:
    """Return the rounds of a training as the app and the run count them."""
    left = counter.begin_training(rounds)
    app_rounds = range(counter.skipped + 1, counter.skipped + left + 1)
    return [(number, counter.begin(number)) for number in app_rounds]


def test_the_rounds_of_a_run_continue_over_trainings_that_each_begin_at_one() -> None:
    counter = RoundCounter()
    assert train(counter, 2) == [(1, 1), (2, 2)]
    assert train(counter, 2) == [(1, 3), (2, 4)]


def test_a_planned_number_replaces_that_of_the_first_training() -> None:
    counter = RoundCounter(planned=3)
    assert len(train(counter, 1)) == 3
    assert len(train(counter, 1)) == 1


def test_a_resumed_run_continues_in_the_middle_of_a_training() -> None:
    assert train(RoundCounter.resume_at(3, planned=0), 4) == [(3, 3), (4, 4)]


def test_a_resumed_run_skips_a_training_that_is_complete() -> None:
    counter = RoundCounter.resume_at(4, planned=0)
    assert train(counter, 2) == []
    assert train(counter, 3) == [(2, 4), (3, 5)]


def test_a_round_that_is_configured_twice_counts_once() -> None:
    counter = RoundCounter()
    counter.begin_training(2)
    assert [counter.begin(number) for number in (7, 7, 9)] == [1, 1, 2]
