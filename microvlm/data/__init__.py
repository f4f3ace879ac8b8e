"""Read, augment and batch image-caption pairs."""
