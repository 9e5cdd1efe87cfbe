"""Builds agents from settings."""
