"""Experiment trackers: one interface, and an adapter for each tool."""
