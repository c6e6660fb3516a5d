"""What changes the weights: the loss, the optimizers and their schedules, and which weights a run ends with."""
