"""The engine ``ray``: workers as actors of a Ray cluster, on one or several machines. Needs the extra ``ray``."""
