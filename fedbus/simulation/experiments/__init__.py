"""Experiments: a grid of simulated runs, which resumes cell by cell, and its tables, plots and page."""
