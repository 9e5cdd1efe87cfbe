"""The server manager: opens runs, decides which model and which code the clients of a task have."""
