"""Decisions as pure functions over contracts. No clock, no event loop, no I/O."""
