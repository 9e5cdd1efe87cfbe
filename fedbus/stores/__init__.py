"""Persistent state: models, code, captured data, task directories. The only package that runs git."""
