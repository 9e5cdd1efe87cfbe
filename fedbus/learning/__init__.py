"""Training: weights, rounds, and the adapters of training libraries. The only package that imports torch."""
