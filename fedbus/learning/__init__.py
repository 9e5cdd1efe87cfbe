"""The only package that imports flwr and torch."""
