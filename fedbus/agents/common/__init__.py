"""What several agents use: asyncio helpers, child processes, tracing, liveness."""
