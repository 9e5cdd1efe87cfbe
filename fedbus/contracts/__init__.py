"""The wire format of fedbus: messages, subjects, lifecycles and permissions. No I/O.

All other packages may import it, and it imports none of them.
"""
