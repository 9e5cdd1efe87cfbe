"""Who acts, one module an agent. No agent imports another."""
