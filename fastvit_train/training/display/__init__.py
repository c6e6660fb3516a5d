"""What a training run shows in the terminal while it trains, and before."""
