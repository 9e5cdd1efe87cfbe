"""A TCP proxy between a device and nats-server that applies the device's profile to the real connection.

`link` has the bandwidth and delays of one direction, `proxy` the connections. TLS passes through unchanged: the proxy
sees bytes, not messages.
"""
