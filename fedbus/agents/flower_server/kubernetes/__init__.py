"""Running a server session as a Kubernetes Job."""
