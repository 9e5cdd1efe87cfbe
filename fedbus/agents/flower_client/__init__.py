"""The Flower client: runs a task's ClientApp in a child process for one run."""
