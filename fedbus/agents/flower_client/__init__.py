"""The Flower client: runs the client session of a run, in a child process."""
