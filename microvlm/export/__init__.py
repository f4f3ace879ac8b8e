"""Export checkpoints for other runtimes."""
