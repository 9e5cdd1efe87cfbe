"""Where the figures of training go: one interface, and an adapter for each tool people keep their curves in."""
