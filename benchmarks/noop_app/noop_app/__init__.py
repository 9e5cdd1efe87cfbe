"""Rounds without training."""
