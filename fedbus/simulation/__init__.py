"""Virtual clients, network profiles, experiments."""
