"""The edge: command line, settings, telemetry, embedded servers."""
