"""fedbus operates federated learning: agents that exchange typed events over NATS."""

__version__ = "0.1.0"
