"""Search for the best settings: the verb `sweep`."""
