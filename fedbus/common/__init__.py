"""Helpers that every layer may import: atomic file writes, retry with backoff, a lock for `ast.parse`.

Imports nothing of fedbus.
"""
