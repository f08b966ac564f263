"""What made the shipped model and the small experiments; run in a checkout, not installed."""
