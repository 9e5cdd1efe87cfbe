"""fedbus operates federated learning: agents that exchange typed events over NATS."""

from fedbus.common.ast_lock import install_ast_lock

__version__ = "0.1.0"

install_ast_lock()
