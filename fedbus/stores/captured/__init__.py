"""Captured predictions and labels of one device, in SQLite."""
