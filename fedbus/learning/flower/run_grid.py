"""The Grid of a run: Flower's Grid, with what the hooks of strategies need in addition."""

from abc import abstractmethod

from flwr.serverapp import Grid

from fedbus.learning.library import RoundTally


class RunGrid(Grid):
    """The Grid of one run, whatever carries its messages."""

    @property
    @abstractmethod
    def run_name(self) -> str:
        """The name of the run on the bus."""

    @abstractmethod
    def client_of(self, node: int) -> str:
        """Return the client of Flower's node id *node*; a client that has left, too."""

    @abstractmethod
    def tally(self, round_number: int) -> RoundTally:
        """Return a copy of the participants of the round so far."""
