"""The training monitor: forwards a run's metrics to experiment trackers."""
