"""Draw attention and memory."""
