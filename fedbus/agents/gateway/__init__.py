"""The gateway: HTTP API and WebSocket feed of the dashboard."""
