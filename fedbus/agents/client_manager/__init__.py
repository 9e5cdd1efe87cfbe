"""The client manager: keeps code and model of one device current and decides whether the device trains."""
