"""What `fedbus simulate` adds to a simulation: its results folder, trackers, signals, and publishing of its model."""
