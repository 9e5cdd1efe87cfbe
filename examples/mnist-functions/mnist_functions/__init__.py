"""Handwritten digits, learned by three fully connected layers in plain NumPy."""
