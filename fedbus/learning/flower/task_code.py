"""Loads a task's Flower apps, and checks their types."""

from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbus.learning.task_code import BadTask, describe_error, load_instance

__all__ = ["BadTask", "describe_error", "load_client_app", "load_server_app"]


def load_server_app(path: Path, reference: str) -> ServerApp:
    """Load a Flower ServerApp. Raises BadTask."""
    return load_instance(path, reference, ServerApp)


def load_client_app(path: Path, reference: str) -> ClientApp:
    """Load a Flower ClientApp. Raises BadTask."""
    return load_instance(path, reference, ClientApp)
