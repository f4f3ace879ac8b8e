"""Compose checkpoints from pretrained parts."""
