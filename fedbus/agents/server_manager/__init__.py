"""The server manager: owns the lifecycle of one task's server, its code and its champion model."""
