"""The Flower adapter. The only package that imports flwr."""
