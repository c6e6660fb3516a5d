"""Data sets by name, their images in memory or on disk, augmentation, and batches."""
