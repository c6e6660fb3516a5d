"""Augmentation in batches on the device: what is drawn for each sample, and the operations."""
