"""Profiles: the delays, bandwidth, losses, absences and speed of clients, as YAML data.

`schema` has the keys, `reader` reads a file or a built-in profile, `conditions` computes with it. The simulator, the
fleet under virtual time and the fault proxy use the same profile and draw the same values from its seed.
"""
