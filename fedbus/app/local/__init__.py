"""Runs nats-server, SeaweedFS and all agents on one machine."""
