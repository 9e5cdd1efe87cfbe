"""A minimal task: training adds one to every weight, so the weights are the number of trainings."""
