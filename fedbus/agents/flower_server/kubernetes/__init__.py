"""Running a ServerApp as a Kubernetes Job."""
