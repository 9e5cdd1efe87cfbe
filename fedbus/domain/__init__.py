"""Decisions as pure functions over contracts. No clock, no loop, no I/O."""
