"""The Flower server: runs the server session of a run, in a child process or a Kubernetes Job."""
