"""The Flower server: runs a task's ServerApp, in a child process or a Kubernetes Job."""
