"""The device monitor: publishes health and capabilities of one device."""
