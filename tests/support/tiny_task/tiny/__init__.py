"""A task as small as one can be: training adds one to every weight, so that a model tells how often it was trained."""
