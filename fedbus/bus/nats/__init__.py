"""Adapters for nats-py: connection, cancellation, parser, authorization errors."""
