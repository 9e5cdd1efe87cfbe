"""Read models: what commands show of a federation."""
