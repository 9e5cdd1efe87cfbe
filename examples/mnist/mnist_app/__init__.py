"""Handwritten digits, learned by three fully connected layers."""
