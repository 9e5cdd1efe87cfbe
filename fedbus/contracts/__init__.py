"""The ground: what is said on the bus, where it is said, and in which order it may be said.

Nothing here waits, connects or reads a file; everything above may use it.
"""
