"""Data: sets by name, where their images come from, augmentation, batches."""
