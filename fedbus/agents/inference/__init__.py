"""The inference agent: serves predictions without interruption and swaps models."""
