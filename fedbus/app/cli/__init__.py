"""The `fedbus` command line."""
