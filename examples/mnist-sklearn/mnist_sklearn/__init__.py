"""Handwritten digits, learned by scikit-learn's linear classifier."""
