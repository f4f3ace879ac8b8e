"""Score checkpoints."""
