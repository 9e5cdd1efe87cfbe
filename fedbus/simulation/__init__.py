"""Simulation: a task on virtual clients, its control plane under virtual time, and experiments."""
