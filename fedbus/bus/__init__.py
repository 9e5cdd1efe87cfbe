"""Typed messages, lifecycles and blobs over NATS. The only package that imports nats."""
