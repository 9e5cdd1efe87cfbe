"""SCAFFOLD as a Flower app: control variates correct the drift of clients with unlike data."""
