"""The same numbers in less time: packed products, fused losses, many adapters at once."""
