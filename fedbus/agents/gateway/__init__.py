"""The gateway: the HTTP API of the dashboard and its server-sent event feed."""
