"""The only package that wires: command line, settings, telemetry, local servers, provisioning."""
