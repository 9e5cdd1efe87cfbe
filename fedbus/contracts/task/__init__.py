"""The `[tool.fedbus]` table of a task."""
