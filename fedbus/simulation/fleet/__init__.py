"""The control plane of a fleet under virtual time: the real agents on an in-memory bus.

Server manager, workflow scheduler, flower server, client managers and flower clients are the agents of a federation.
Simulated are the app's processes and the devices: server sessions, trainers, inference, downloads, disks and network,
whose times come from a profile. The event loop jumps to the next timer, so an hour takes as long as its events need.

`simulate_fleet` runs a fleet.
"""
