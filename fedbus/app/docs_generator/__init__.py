"""Generator of the reference pages in `docs/`, from the contracts."""
