"""Helpers that every layer may import: atomic file writes, retry with backoff. Imports nothing of fedbus."""
