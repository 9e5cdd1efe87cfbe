"""Flower's own SuperLink and SuperNodes carry the messages of a run: `library = "flower-superlink"`."""
