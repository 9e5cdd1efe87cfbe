"""The number of a round in the run, for apps that may train several times and resume after a lost server."""

from dataclasses import dataclass


@dataclass
class RoundCounter:
    """Counts the rounds of one run over all trainings of its app: 1, 2, … while each training begins at 1.

    A resumed run skips the rounds that its predecessor completed: whole trainings, then rounds of the next one.
    """

    planned: int = 0
    """The number of rounds of the first training, which replaces the app's own; 0: the app's own number applies."""
    completed: int = 0
    """Rounds that the predecessor completed and that no training has skipped yet."""
    current: int = 0
    """The number of the round in the run."""
    skipped: int = 0
    """Rounds of this training that are skipped."""
    is_first: bool = True
    _last: int | None = None
    """The round of the last `begin`, as the app counts."""

    @classmethod
    def resume_at(cls, first_round: int, *, planned: int) -> "RoundCounter":
        return cls(planned, completed=first_round - 1)

    def begin_training(self, rounds: int) -> int:
        """Begin a training of *rounds* rounds, and return the number that is left of it."""
        rounds = self.planned if self.is_first and self.planned else rounds
        self.is_first, self._last = False, None
        self.skipped = min(self.completed, rounds)
        self.completed -= self.skipped
        self.current += self.skipped
        return rounds - self.skipped

    def begin(self, app_round: int) -> int:
        """Begin the round that the app counts as *app_round*, and return its number in the run."""
        if app_round != self._last:
            self._last = app_round
            self.current += 1
        return self.current
