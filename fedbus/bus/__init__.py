"""The only package that imports nats."""
