"""`fedbus provision`: keys, credentials and certificates of a federation."""
