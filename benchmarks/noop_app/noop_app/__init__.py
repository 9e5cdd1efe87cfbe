"""Rounds in which nothing is learned."""
