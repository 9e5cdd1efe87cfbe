"""Everything that is on the wire: messages, subjects, lifecycles, permissions. No I/O.

Every other package may import it; it imports none of them.
"""
