"""`fedbus events`: show, replay and decode messages."""
